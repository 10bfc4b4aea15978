"""Float32 masters of what is trained, the optimizer that moves them, and the number format that a model trains in."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adasearch.tuning.eightbit import AdamW8bit

if TYPE_CHECKING:
    from adasearch.sections import TrainingRules
    from adasearch.tuning.parallel import Group
    from adasearch.tuning.training import TrainingConfig

_BETAS = (0.9, 0.95)


class Masters:
    """Float32 copies of what is trained, which the optimizer changes; the model's own follow after every step.

    Args:
        parameters: of the model, of any floating dtype; float32 ones are their own masters.
        config: AdamW's settings.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = list(parameters)
        self.copies = [p.detach() if p.dtype == torch.float32 else p.detach().float() for p in self.parameters]
        self._copy_of: dict[Tensor, Tensor] = dict(zip(self.parameters, self.copies, strict=True))
        self._clip, self._decay = config.grad_clip, config.weight_decay
        self._optimizer: torch.optim.AdamW | AdamW8bit | None = None
        self._eight_bits = False

    def prepare(self, rules: TrainingRules) -> None:
        """Take the optimizer that the rules of a run ask for; before the first step."""
        assert self._optimizer is None, "an optimizer is chosen before it has states"
        self._eight_bits = rules.optimizer == "adamw8bit"

    def copy(self, parameter: Tensor) -> Tensor:
        """Return the float32 copy of a parameter."""
        return self._copy_of[parameter]

    def gradient(self, parameter: Tensor) -> Tensor:
        """Return the gradient of a parameter's copy, 0 where it has none."""
        copy = self._copy_of[parameter]
        return torch.zeros_like(copy) if copy.grad is None else copy.grad

    @property
    def optimizer(self) -> torch.optim.AdamW | AdamW8bit:
        """Return the optimizer, made when it is first needed. Only matrices decay."""
        if self._optimizer is None and self._eight_bits:
            self._optimizer = AdamW8bit(self.copies, [self._decay * (c.dim() > 1) for c in self.copies], _BETAS)
        elif self._optimizer is None:
            matrices = [c for c in self.copies if c.dim() > 1]
            rest = [c for c in self.copies if c.dim() <= 1]
            groups = [{"params": matrices, "weight_decay": self._decay}, {"params": rest, "weight_decay": 0.0}]
            self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=_BETAS, fused=True)
        return self._optimizer

    def gather(self) -> None:
        """Add the model's gradients to those of the copies, and drop them.

        So the parts of a batch are summed up in float32; with 8-bit states they stay where they are, in the dtype of
        the model, because memory is what such a run lacks.
        """
        if self._eight_bits:
            return
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            if parameter.grad is not None:
                grad = parameter.grad.float()
                copy.grad = grad if copy.grad is None else copy.grad.add_(grad)
                parameter.grad = None

    def reduce(self, group: Group) -> None:
        """Sum the gradients over the processes of a group; what has a gradient in none of them has none after it."""
        self.gather()
        holders = self.parameters if self._eight_bits else self.copies
        there = torch.tensor([float(h.grad is not None) for h in holders])
        group.sum(there)
        for holder in (h for h, count in zip(holders, there.tolist(), strict=True) if count):
            holder.grad = torch.zeros_like(holder) if holder.grad is None else holder.grad
            group.sum(holder.grad)

    def step(self, rate: float, stepped: Callable[[], None] | None = None) -> float:
        """Make one AdamW step at learning rate `rate` from the model's gradients, drop them, return their norm.

        Args:
            rate: of the step.
            stepped: called before the gradients go; it may change the copies.
        """
        self.gather()
        optimizer = self.optimizer
        if isinstance(optimizer, AdamW8bit):
            return self._step_each(optimizer, rate, stepped)
        norm = float(nn.utils.clip_grad_norm_(self.copies, self._clip))
        if not math.isfinite(norm):
            return norm
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if stepped is not None:
            stepped()
        optimizer.zero_grad()  # float32 gradients are not kept through the next forward and backward
        self.follow()
        return norm

    @torch.no_grad()
    def _step_each(self, optimizer: AdamW8bit, rate: float, stepped: Callable[[], None] | None) -> float:
        """Make a step of one tensor after the other: only one float32 gradient exists at a time, unless `stepped`."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        if not math.isfinite(norm):
            return norm
        scale = min(1.0, self._clip / (norm + 1e-6))
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            if parameter.grad is None:
                continue
            copy.grad, parameter.grad = parameter.grad.float().mul_(scale), None
            optimizer.update(copy, copy.grad, rate)
            if stepped is None:
                copy.grad = None
        if stepped is not None:
            stepped()
            for copy in self.copies:
                copy.grad = None
        self.follow()
        return norm

    @torch.no_grad()
    def follow(self) -> None:
        """Round the copies to the model's parameters."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.copy_(copy)

    def restore_precision(self) -> None:
        """Make the model's parameters float32 with the masters' values, which a merge then rounds only once."""
        for copy, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.data = copy

    def weights(self) -> list[Tensor]:
        """Return the copies as they are, each with a storage of its own: some are views of a whole file."""
        return [c if c.untyped_storage().nbytes() == c.nbytes else c.clone() for c in self.copies]

    @torch.no_grad()
    def take(self, weights: Sequence[Tensor]) -> None:
        """Give the copies, and the model, the values of `weights`."""
        for copy, weight in zip(self.copies, weights, strict=True):
            copy.copy_(weight)
        self.follow()

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer states, for `restore`."""
        return {"weights": self.weights(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the run was that gave `state`."""
        self.take(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


@contextlib.contextmanager
def computing_in(model: nn.Module, masters: Masters, precision: str) -> Iterator[None]:
    """Let a model and what is trained be of another dtype inside; only masters keep what a smaller one would round.

    What is trained ends with its master's value in the dtype that it had, all else with the very tensor. Vectors that
    are no part of the model, such as DoRA's magnitudes, stay as they are.

    Args:
        model: of any floating dtype.
        masters: of what is trained.
        precision: ``model`` leaves all as it is; ``bfloat16``, ``float32``.
    """
    if precision == "model":
        yield
        return
    dtype: torch.dtype = getattr(torch, precision)
    own = list(model.parameters())
    known = set(own)
    trained = {p: p.dtype for p in masters.parameters if (p in known or p.dim() > 1) and p.dtype != dtype}
    frozen = {p: p.data for p in own if p not in trained and p.is_floating_point() and p.dtype != dtype}
    try:
        for parameter in (*trained, *frozen):
            parameter.grad = None
        for parameter in trained:
            parameter.data = masters.copy(parameter).to(dtype)
        for parameter, data in frozen.items():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, before in trained.items():
            parameter.grad = None
            parameter.data = masters.copy(parameter).to(before)
        for parameter, data in frozen.items():
            parameter.data = data
