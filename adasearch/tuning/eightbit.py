"""AdamW whose two moments take a byte for each element: block-wise quantisation (Dettmers et al., arXiv 2110.02861).

A block of elements shares one float32 scale, its greatest magnitude, so that an outlier costs digits in its own block
only (section 2.1). Codes are not linear: a code c of n stands for (c / n)^p of the scale, which keeps the relative
error of small elements small. The first moment has a sign, n = 127 and p = 2; of the second its root is kept, which is
what an update divides by, with n = 255 and p = 2. A root that is not 0 never becomes 0: it would divide by nothing.

Shape letters: N elements of a tensor, Q blocks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
LEAST = 4096
"""Elements below which a tensor's moments stay float32: norms and biases cost nothing and steer much."""


class Packed(NamedTuple):
    """A tensor in a byte for each element: codes (Q × `BLOCK`, int8 or uint8) and scales (Q, float32)."""

    codes: Tensor
    scales: Tensor


def _blocks(x: Tensor) -> Tensor:
    flat = x.flatten()
    return functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def pack_signed(x: Tensor) -> Packed:
    """Return x (any shape, float32) packed, its sign kept."""
    blocks = _blocks(x)
    scales = blocks.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny)
    roots = (blocks / scales[:, None]).abs_().sqrt_().mul_(127.0).round_()
    return Packed(roots.copysign_(blocks).to(torch.int8), scales)


def unpack_signed(packed: Packed, shape: torch.Size) -> Tensor:
    """Return what `pack_signed` packed, as well as it is known (float32)."""
    codes = packed.codes.float().div_(127.0)
    return _shaped(codes.mul_(codes.abs()).mul_(packed.scales[:, None]), shape)


def pack_positive(x: Tensor) -> Packed:
    """Return x (any shape, float32, no element below 0) packed; what is above 0 stays so."""
    blocks = _blocks(x)
    scales = blocks.amax(1).clamp_min_(torch.finfo(torch.float32).tiny)
    codes = (blocks / scales[:, None]).sqrt_().mul_(255.0).round_()
    return Packed(torch.maximum(codes, (blocks > 0).float()).to(torch.uint8), scales)


def unpack_positive(packed: Packed, shape: torch.Size) -> Tensor:
    """Return what `pack_positive` packed, as well as it is known (float32)."""
    return _shaped(packed.codes.float().div_(255.0).square_().mul_(packed.scales[:, None]), shape)


def _shaped(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.flatten()[: shape.numel()].view(shape)


class Moments:
    """The two moments of one tensor, m and the root of v, packed where the tensor is large."""

    def __init__(self, like: Tensor) -> None:
        zero = torch.zeros_like(like, dtype=torch.float32)
        self._shape = like.shape
        self._packs = like.numel() >= LEAST
        self._held: tuple[Any, Any] = (zero, zero.clone()) if not self._packs else (None, None)
        if self._packs:
            self.hold(zero, zero)

    def read(self) -> tuple[Tensor, Tensor]:
        """Return m and the root of v, float32."""
        first, second = self._held
        if not self._packs:
            return first, second
        return unpack_signed(first, self._shape), unpack_positive(second, self._shape)

    def hold(self, first: Tensor, second: Tensor) -> None:
        """Keep m and the root of v."""
        self._held = (pack_signed(first), pack_positive(second)) if self._packs else (first, second)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Return what is held."""
        first, second = self._held
        return (*first, *second) if self._packs else (first, second)

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Take over what `tensors` gave."""
        for own, other in zip(self.tensors, tensors, strict=True):
            own.copy_(other)


class AdamW8bit:
    """AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2), one tensor at a time, with packed moments.

    Args:
        parameters: float32.
        decays: weight decay of each.
        betas: of the moments.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        decays: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self._moments = {p: Moments(p) for p in parameters}
        self._steps = dict.fromkeys(parameters, 0)
        self._decays = dict(zip(parameters, decays, strict=True))
        self._betas, self._eps = betas, eps

    @torch.no_grad()
    def update(self, parameter: Tensor, grad: Tensor, rate: float) -> None:
        """Make one step of `parameter` from its gradient (float32), at learning rate `rate`."""
        self._steps[parameter] += 1
        steps, (beta1, beta2) = self._steps[parameter], self._betas
        first, root = self._moments[parameter].read()
        first = first.lerp_(grad, 1.0 - beta1)
        second = root.square_().mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = second.sqrt_()
        parameter.mul_(1.0 - rate * self._decays[parameter])
        length = root / (1.0 - beta2**steps) ** 0.5
        parameter.addcdiv_(first, length.add_(self._eps), value=-rate / (1.0 - beta1**steps))
        self._moments[parameter].hold(first, root)

    @property
    def state_bytes(self) -> int:
        """Return how many bytes the moments take."""
        return sum(t.numel() * t.element_size() for m in self._moments.values() for t in m.tensors)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` takes over."""
        return {"steps": list(self._steps.values()), "moments": [list(m.tensors) for m in self._moments.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the optimizer was that gave `state`."""
        self._steps = dict(zip(self._steps, state["steps"], strict=True))
        for moments, tensors in zip(self._moments.values(), state["moments"], strict=True):
            moments.restore(tensors)
