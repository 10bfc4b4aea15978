"""AdaLoRA: updates in the form of a singular value decomposition that share one budget of ranks (arXiv 2303.10512).

Zhang et al., ICLR 2023. Shape letters: M outputs and K inputs of a projection, R rank of its update P diag(lambda) Q.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adasearch.documents import Fraction, NonNegative, Positive, value
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.decoder import Update, Updates
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.recovery._adapters import AtLeastOne, Paced, PacedOptions, check, projections, tune, widest
from adasearch.tuning.training import Adapters, Batch

_SPREAD = 0.02
"""Standard deviation of the first values of P and Q, as in the published code; lambda begins at 0."""


@value
class AdaloraOptions(PacedOptions):
    """Settings of AdaLoRA, beside those of all adapters; `rank` times the number of adapters is the final budget.

    Args:
        alpha: numerator of an update's scale; its denominator is the rank that the update begins with.
        start: rank that every update begins with, in multiples of `rank`; at most the projection's smaller side.
        orthogonality: weight of the regulariser, see `Svd.penalty`.
        beta_importance: of the moving average of sensitivities.
        beta_uncertainty: of the moving average of their variation.
        lr: greatest learning rate. An update is a product of three factors that begin small: it moves far less than one
            of LoRA at the same rate.
    """

    lr: Positive = 5e-3
    alpha: Positive = 16.0
    start: AtLeastOne = 1.5
    orthogonality: NonNegative = 0.5
    beta_importance: Fraction = 0.85
    beta_uncertainty: Fraction = 0.85


class Triplets(NamedTuple):
    """Factors of one update: P (M × R), lambda (R), Q (R × K). Triplet i is P's column, lambda's number, Q's row i."""

    left: nn.Parameter
    values: nn.Parameter
    right: nn.Parameter


class Sensitivity:
    """Smoothed importance of the elements of a tensor, and its uncertainty (equations 9 and 10).

    With I = |w dL/dw| of a step: mean = b1 mean + (1 - b1) I, then spread = b2 spread + (1 - b2) |I - mean|.

    Args:
        like: the tensor.
        betas: b1 and b2.
    """

    def __init__(self, like: Tensor, betas: tuple[float, float]) -> None:
        self.mean, self.spread = torch.zeros_like(like), torch.zeros_like(like)
        self._betas = betas

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """Take a step into account."""
        now = (weight * grad).abs_()
        self.mean.lerp_(now, 1.0 - self._betas[0])
        self.spread.lerp_(now.sub_(self.mean).abs_(), 1.0 - self._betas[1])

    @property
    def scores(self) -> Tensor:
        """Return mean times spread of every element (equation 11)."""
        return self.mean * self.spread


def triplet_scores(left: Tensor, values: Tensor, right: Tensor) -> Tensor:
    """Return the score of every triplet (R) from those of its elements: lambda's plus the means over P and Q (7)."""
    return values + left.mean(0) + right.mean(1)


def kept(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return which of all scores are among the `budget` greatest (bool, of the same shapes); of equal ones the first.

    Args:
        scores: vectors.
        budget: at most their length together.
    """
    flat = torch.cat(list(scores))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:budget]] = True
    return list(torch.split(chosen, [len(s) for s in scores]))


class Svd(Paced):
    """Updates s P diag(lambda) Q whose least important triplets have their lambda set to 0, over all modules at once.

    A triplet that is out may come back until the budget has reached its end: its P and Q are trained on.

    Args:
        modules: that get an update.
        options: of the run.
        steps: of the run.
    """

    def __init__(self, modules: Iterable[nn.Linear], options: AdaloraOptions, steps: int) -> None:
        super().__init__({}, options, steps)
        self._alpha, self._orthogonality = options.alpha, options.orthogonality
        self.triplets = {m: _triplets(m, min(math.ceil(options.start * options.rank), widest(m))) for m in modules}
        betas = (options.beta_importance, options.beta_uncertainty)
        self._sensitivities = {p: Sensitivity(p.detach().float(), betas) for p in self.parameters()}
        start = sum(len(t.values) for t in self.triplets.values())
        self.totals = start, min(start, options.rank * len(self.triplets))
        self.masks: list[Tensor] | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return all factors."""
        return [factor for triplets in self.triplets.values() for factor in triplets]

    def updates(self) -> Updates:
        """Return the updates with lambda in their first factor."""
        alpha, dropout = self._alpha, self._options.dropout
        return {
            module: Update((t.values[:, None] * t.right).to(t.right.dtype), t.left, alpha / len(t.values), dropout)
            for module, t in self.triplets.items()
        }

    def penalty(self) -> Tensor | None:
        """Return the weighted mean over all P and Q of |P^T P - 1| and |Q Q^T - 1|, Frobenius norms.

        The paper (equation 4) has the sum of the squares; its code, and PEFT, the mean of the norms, as here.
        """
        if self._orthogonality == 0:
            return None
        grams = [x.float() for t in self.triplets.values() for x in (t.left.T, t.right)]
        distances = [torch.linalg.matrix_norm(x @ x.T - torch.eye(len(x), device=x.device)) for x in grams]
        return self._orthogonality * torch.stack(distances).mean()

    def state(self) -> dict[str, Any]:
        """Return the sensitivities, and which triplets are left."""
        return {"masks": self.masks, "sensitivities": [[s.mean, s.spread] for s in self._sensitivities.values()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        device = next(iter(self._sensitivities)).device
        self.masks = None if state["masks"] is None else [mask.to(device, copy=True) for mask in state["masks"]]
        for own, (mean, spread) in zip(self._sensitivities.values(), state["sensitivities"], strict=True):
            own.mean.copy_(mean)
            own.spread.copy_(spread)

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:  # noqa: ARG002 - signature of the hook
        """Take the step's sensitivities into account, and keep to the budget.

        Weights count as the step left them, and the last decision goes by the steps before it, both as in PEFT.
        """
        last = self._options.last(self._steps)
        if step < last:
            for parameter, sensitivity in self._sensitivities.items():
                copy = masters.copy(parameter)
                if copy.grad is not None:
                    sensitivity.update(copy, copy.grad)
        budget = self._options.left(step, self._steps, self.totals, power=3)
        if budget is not None:
            self.masks = kept(self._scores(), budget)
        if self.masks is not None and (budget is not None or step > last):
            for triplets, mask in zip(self.triplets.values(), self.masks, strict=True):
                masters.copy(triplets.values).masked_fill_(~mask, 0.0)

    def _scores(self) -> list[Tensor]:
        return [triplet_scores(*(self._sensitivities[p].scores for p in t)) for t in self.triplets.values()]


def _triplets(module: nn.Linear, rank: int) -> Triplets:
    like = module.weight
    left = torch.empty(module.out_features, rank, device=like.device).normal_(std=_SPREAD)
    right = torch.empty(rank, module.in_features, device=like.device).normal_(std=_SPREAD)
    values = torch.zeros(rank, device=like.device)
    return Triplets(*(nn.Parameter(factor.to(like.dtype)) for factor in (left, values, right)))


@RECOVERY.register(options=AdaloraOptions, check=check, adapters=True)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: AdaloraOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train updates under a falling budget of ranks and merge them; the signature is that of the set.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    modules = projections(model, structure, options)

    def make(steps: int) -> Adapters:
        return Svd(modules.values(), options, steps)

    return tune(model, make, tokens, options, context)
