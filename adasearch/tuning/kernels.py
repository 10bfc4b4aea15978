"""The steps of a decoder layer with their gradients written by hand: what a stock autograd graph pays for is left out.

Each class computes several operations of a layer at once and keeps only what its backward cannot cheaply make again.
Weights that are frozen get no gradient; low-rank updates ride along without a node of their own. Numbers are rounded
to the dtype of the weights where transformers rounds them, or later: norms and softmax compute in float32 inside.

Shape letters: B sequences, T tokens of a sequence, N = B * T rows, D hidden size, K inputs and M outputs of a
projection, R rank, E head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Projection(NamedTuple):
    """y = gain * (x weight^T + scale * drop(x) a^T b^T) + bias.

    Args:
        weight: M × K.
        bias: M or None.
        a: R × K, first factor of a low-rank update, or None (Hu et al., ICLR 2022).
        b: M × R, second factor, or None.
        scale: of the update.
        dropout: share of the update's inputs that is dropped.
        gain: M, factor of each output (DoRA, Liu et al., ICML 2024, equation 5), or None for 1.
    """

    weight: Tensor
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    gain: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return what may have a gradient: weight, bias, a, b, gain."""
        return self.weight, self.bias, self.a, self.b, self.gain


_TENSORS = 5
"""Length of `Projection.tensors`."""


class _Adapted:
    """Forward and backward of projections that read the same rows; their updates share one product."""

    def __init__(self, projections: tuple[Projection, ...]) -> None:
        self.projections = projections
        self.updates = [p for p in projections if p.a is not None]
        self.gained = any(p.gain is not None for p in projections)

    def kept(self, x: Tensor) -> Tensor | None:
        """Return a random mask of what dropout keeps, scaled so that the mean stays, or None without dropout."""
        share = self.updates[0].dropout if self.updates else 0.0
        return None if share == 0 else torch.empty_like(x).bernoulli_(1 - share).div_(1 - share)

    def down(self) -> Tensor:
        """Return the first factors of all updates below each other."""
        factors = [p.a for p in self.updates if p.a is not None]
        return factors[0] if len(factors) == 1 else torch.cat(factors)

    def ranks(self) -> list[int]:
        """Return the rank of each update."""
        return [p.a.shape[0] for p in self.updates if p.a is not None]

    def scaled(self, inner: Tensor) -> Tensor:
        """Return N × sum of R, in place, the columns of each update times its scale."""
        if len({p.scale for p in self.updates}) == 1:
            return inner.mul_(self.updates[0].scale)
        for part, p in zip(torch.split(inner, self.ranks(), 1), self.updates, strict=True):
            part.mul_(p.scale)
        return inner

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None, list[Tensor]]:
        """Return the outputs for x (N × K), the scaled inner states (N × sum of R) and the outputs before gains.

        The last are those of projections that have a gain, whose backward needs them.
        """
        outputs = [functional.linear(x, p.weight, p.bias if p.gain is None else None) for p in self.projections]
        inner = None
        if self.updates:
            inner = self.scaled((x if mask is None else x * mask) @ self.down().T)
            begin = 0
            for output, p in zip(outputs, self.projections, strict=True):
                if p.b is not None:
                    output.addmm_(inner[:, begin : begin + p.b.shape[1]], p.b.T)
                    begin += p.b.shape[1]
        if not self.gained:
            return outputs, inner, []
        plain = [output for output, p in zip(outputs, self.projections, strict=True) if p.gain is not None]
        return [_times_gain(output, p) for output, p in zip(outputs, self.projections, strict=True)], inner, plain

    def backward(
        self,
        grads: list[Tensor],
        x: Tensor,
        saved: tuple[Tensor | None, Tensor | None, list[Tensor]],
        needed: list[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradient of x and those of `Projection.tensors` of each projection, None where not needed.

        Args:
            grads: of the outputs.
            x: what the projections read, N × K.
            saved: inner states, dropout's mask, and outputs before gains, as `kept` and `forward` gave them.
            needed: which of the tensors need a gradient.
        """
        inner, mask, plain = saved
        found: list[Tensor | None] = []
        for index, grad in enumerate(grads):
            bias = needed[_TENSORS * index + 1]
            found += [None, grad.sum(0) if bias else None, None, None, None]
        if self.gained:
            grads = self._through_gains(grads, plain, found)
        dx = grads[0] @ self.projections[0].weight
        for grad, p in zip(grads[1:], self.projections[1:], strict=True):
            dx.addmm_(grad, p.weight)
        for index, grad in enumerate(grads):
            if needed[_TENSORS * index]:
                found[_TENSORS * index] = grad.T @ x
        if inner is not None:
            self._through_updates(grads, x, (inner, mask), dx, found)
        return dx, found

    def _through_gains(self, grads: list[Tensor], plain: list[Tensor], found: list[Tensor | None]) -> list[Tensor]:
        """Return the gradients of the outputs before gains; put those of the gains into `found`."""
        before = iter(plain)
        through: list[Tensor] = []
        for index, (grad, p) in enumerate(zip(grads, self.projections, strict=True)):
            if p.gain is not None:
                found[_TENSORS * index + 4] = (grad * next(before)).sum(0)
            through.append(grad if p.gain is None else grad * p.gain)
        return through

    def _through_updates(
        self,
        grads: list[Tensor],
        x: Tensor,
        saved: tuple[Tensor, Tensor | None],
        dx: Tensor,
        found: list[Tensor | None],
    ) -> None:
        """Add the updates' part to the gradient of x (`dx`), and put those of their factors into `found`."""
        inner, mask = saved
        steps: list[Tensor] = []
        begin = 0
        for index, (grad, p) in enumerate(zip(grads, self.projections, strict=True)):
            if p.b is not None:
                found[_TENSORS * index + 3] = grad.T @ inner[:, begin : begin + p.b.shape[1]]
                steps.append(grad @ p.b)
                begin += p.b.shape[1]
        inside = self.scaled(steps[0] if len(steps) == 1 else torch.cat(steps, 1))
        down = inside.T @ (x if mask is None else x * mask)
        parts = iter(torch.split(down, self.ranks()))
        for index, p in enumerate(self.projections):
            found[_TENSORS * index + 2] = None if p.a is None else next(parts)
        if mask is None:
            dx.addmm_(inside, self.down())
        else:
            dx += (inside @ self.down()).mul_(mask)


def _times_gain(output: Tensor, p: Projection) -> Tensor:
    """Return gain * output + bias; where there is no gain the bias is in the output already."""
    if p.gain is None:
        return output
    return output * p.gain if p.bias is None else torch.addcmul(p.bias, output, p.gain)


def _flat(projections: tuple[Projection, ...]) -> list[Any]:
    return [tensor for p in projections for tensor in p.tensors]


def _gathered(flat: tuple[Any, ...], settings: tuple[tuple[float, float], ...]) -> tuple[Projection, ...]:
    found = []
    for i, (scale, dropout) in enumerate(settings):
        weight, bias, a, b, gain = flat[_TENSORS * i : _TENSORS * (i + 1)]
        found.append(Projection(weight, bias, a, b, scale, dropout, gain))
    return tuple(found)


def _settings(projections: tuple[Projection, ...]) -> tuple[tuple[float, float], ...]:
    return tuple((p.scale, p.dropout) for p in projections)


def _wide(x: Tensor) -> Tensor:
    """Return x in float32 where it has fewer digits."""
    return x.float() if x.element_size() < 4 else x


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) over the last dimension and 1 / rms(x), float32 (Zhang and Sennrich, 2019, equation 4)."""
    single = _wide(x)
    inverse = torch.linalg.vector_norm(single, dim=-1, keepdim=True)
    inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (single.mul_(inverse) if single is not x else single * inverse), inverse


def _norm_backward(grad: Tensor, scaled: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of x from that of weight * x / rms(x); `scaled` is x / rms(x), float32."""
    wide = _wide(grad) * _wide(weight)
    mean = torch.linalg.vecdot(wide, scaled).unsqueeze(-1).div_(scaled.shape[-1])
    return wide.addcmul_(scaled, mean, value=-1).mul_(inverse).to(grad.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scaled, inverse = _normalised(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        return scaled.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        scaled = _wide(x) * inverse
        grad_weight = (grad * scaled.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return _norm_backward(grad, scaled, inverse, weight), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / rms(x) over the last dimension, the mean square taken in float32."""
    result: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _NormProject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, eps: float, settings: Any, *flat: Any) -> tuple[Tensor, ...]:
        adapted = _Adapted(_gathered(flat, settings))
        scaled, inverse = _normalised(x, eps)
        rows = scaled.to(x.dtype).mul_(norm)
        mask = adapted.kept(rows)
        outputs, inner, plain = adapted.forward(rows, mask)
        ctx.adapted = adapted
        ctx.save_for_backward(x, norm, inverse, inner, mask, *plain)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, norm, inverse, inner, mask, *plain = ctx.saved_tensors
        scaled = _wide(x) * inverse
        rows = scaled.to(x.dtype)
        saved = (inner, mask, plain)
        dx, found = ctx.adapted.backward(list(grads), rows * norm, saved, ctx.needs_input_grad[4:])
        grad_norm = (dx * rows).sum(0) if ctx.needs_input_grad[1] else None
        return _norm_backward(dx, scaled, inverse, norm), grad_norm, None, None, *found


def norm_project(x: Tensor, norm: Tensor, eps: float, projections: tuple[Projection, ...]) -> tuple[Tensor, ...]:
    """Return each projection (N × M) of the normalised rows of `x` (N × D); `norm` is the norm's weight (D)."""
    flat = _flat(projections)
    result: tuple[Tensor, ...] = _NormProject.apply(x, norm, eps, _settings(projections), *flat)  # type: ignore[no-untyped-call]
    return result


class _ProjectAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, settings: Any, *flat: Any) -> Tensor:
        adapted = _Adapted(_gathered(flat, settings))
        mask = adapted.kept(x)
        (output,), inner, plain = adapted.forward(x, mask)
        ctx.adapted = adapted
        ctx.save_for_backward(x, inner, mask, *plain)
        return output.add_(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, inner, mask, *plain = ctx.saved_tensors
        dx, found = ctx.adapted.backward([grad], x, (inner, mask, plain), ctx.needs_input_grad[3:])
        return dx, grad, None, *found


def project_add(x: Tensor, residual: Tensor, projection: Projection) -> Tensor:
    """Return `residual` (N × D) plus the projection of `x` (N × K)."""
    flat = _flat((projection,))
    result: Tensor = _ProjectAdd.apply(x, residual, _settings((projection,)), *flat)  # type: ignore[no-untyped-call]
    return result


class _GatedAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, residual: Tensor, settings: Any, *flat: Any) -> Tensor:
        adapted = _Adapted(_gathered(flat, settings))
        active = functional.silu(gate)
        x = active * up if any(ctx.needs_input_grad) else active.mul_(up)
        mask = adapted.kept(x)
        (output,), inner, plain = adapted.forward(x, mask)
        ctx.adapted = adapted
        ctx.save_for_backward(gate, up, active, inner, mask, *plain)
        return output.add_(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up, active, inner, mask, *plain = ctx.saved_tensors
        dx, found = ctx.adapted.backward([grad], active * up, (inner, mask, plain), ctx.needs_input_grad[4:])
        d_up = active * dx
        d_gate = torch.ops.aten.silu_backward(dx.mul_(up), gate)
        return d_gate, d_up, grad, None, *found


def gated_add(gate: Tensor, up: Tensor, residual: Tensor, projection: Projection) -> Tensor:
    """Return `residual` (N × D) plus the projection of silu(gate) * up (N × K): the second half of a gated MLP."""
    flat = _flat((projection,))
    result: Tensor = _GatedAdd.apply(gate, up, residual, _settings((projection,)), *flat)  # type: ignore[no-untyped-call]
    return result


class Rotation(NamedTuple):
    """Rotary position embedding of N rows: cosines and sines (N × E), the sines of the first half negated."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(cos: Tensor, sin: Tensor) -> Rotation:
        """Return the rotation for cosines and sines as transformers gives them (N × E, halves equal)."""
        half = sin.shape[-1] // 2
        return Rotation(cos, torch.cat((-sin[:, :half], sin[:, half:]), -1))

    def wide(self, heads: int) -> Rotation:
        """Return the rotation of rows that hold several heads (N × (heads E)): whole rows multiply fastest."""
        return Rotation(self.cos.repeat(1, heads), self.sin.repeat(1, heads))


def _swapped(x: Tensor, size: int) -> Tensor:
    """Return rows (N × (heads E)) with the two halves of every head exchanged."""
    return x.view(x.shape[0], -1, 2, size // 2).flip(2).view_as(x)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
        ctx.size = size
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(_swapped(x, size), sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return (grad * cos).addcmul_(_swapped(grad.contiguous(), ctx.size), sin, value=-1), None, None, None


def rotate(x: Tensor, rotation: Rotation, size: int) -> Tensor:
    """Return rows of heads of `size` (N × (heads E)), each head rotated (Su et al., 2021, equation 34)."""
    result: Tensor = _Rotate.apply(x, rotation.cos, rotation.sin, size)  # type: ignore[no-untyped-call]
    return result
