"""PrunedLoRA: wide updates that lose ranks for good while they are trained (arXiv 2510.00192).

What goes, and what the ranks that stay become, follows in closed form from the loss to second order, with the Gram
matrix of a factor's gradient for its curvature. Shape letters: M rows of a factor, R its ranks, S those that go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.documents import NonNegative, Positive, value
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.decoder import Update
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.recovery._adapters import (
    AtLeastOne,
    Paced,
    PacedOptions,
    check,
    factors,
    projections,
    tune,
    widest,
)
from adasearch.tuning.training import Adapters, Batch

_NOTHING = 1e-30
"""Mean square below which a gradient counts as 0: its Gram matrix has no digits left in float32."""


@value
class PrunedloraOptions(PacedOptions):
    """Settings of PrunedLoRA, beside those of all adapters; every update ends at `rank`, with the scale 1 (alpha = R).

    Args:
        start: rank that every update begins with, in multiples of `rank`; at most the projection's smaller side.
        damping: added to the diagonal of the curvature, in multiples of its mean.
        trust: greatest norm of the gradient's part in a change, relative to the factor's, see `Surgeon`.
    """

    start: AtLeastOne = 4.0
    damping: Positive = 0.1
    trust: NonNegative = 0.1


class Surgeon:
    """Scores of the ranks of a factor w (M × R), and its best change without some of them.

    The change d minimises <t g, d> + tr(d h d^T) / 2 under w + d = 0 in the columns S, with the gradient g and the
    curvature h = g^T g + e 1 (R × R). With r = w - t g h^-1 it is d = -t g h^-1 - r_S ((h^-1)_SS)^-1 (h^-1)_S, and it
    costs tr(r_S ((h^-1)_SS)^-1 r_S^T) / 2 more than the best change without that condition.

    The published form has t = 1. But with the Gram matrix of a small gradient for the curvature the Newton step g h^-1
    is as long as one over the gradient, whatever the factor: t is the greatest number up to 1 with
    ``|t g h^-1| <= trust |w|``. With trust 0 this is the optimal brain surgeon.

    Args:
        weight: w, float32.
        grad: g.
        damping: e over the mean of the diagonal of g^T g.
        trust: as above.
    """

    def __init__(self, weight: Tensor, grad: Tensor, damping: float, trust: float) -> None:
        gram = grad.T @ grad
        size = float(gram.diagonal().mean())
        # where there is no gradient, as for the first factor while the second is 0, any multiple of 1 will do
        self._flat = size < _NOTHING
        gram.diagonal().add_(1.0 if self._flat else damping * size)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        newton = grad @ self.inverse
        length = float(newton.norm())
        self.share = min(1.0, trust * float(weight.norm()) / length) if length > 0 else 1.0
        self.rest = weight - self.share * newton

    @property
    def scores(self) -> Tensor:
        """Return what each rank alone would cost (R), |r_j|^2 / (h^-1)_jj / 2; 0 where the gradient is 0."""
        if self._flat:
            return self.rest.new_zeros(self.rest.shape[1])
        return self.rest.square().sum(0).div_(2.0 * self.inverse.diagonal())

    def without(self, gone: Tensor) -> Tensor:
        """Return the factor after its best change without the ranks `gone` (indices S), whose columns are 0."""
        block = self.inverse[gone]
        changed: Tensor = self.rest - self.rest[:, gone] @ torch.linalg.solve(block[:, gone], block)
        changed[:, gone] = 0.0
        return changed


class Shrinking(Paced):
    """Updates b a that lose their cheapest ranks between two points of a run, each module for itself.

    A rank costs what its column of b and its row of a cost together. What is gone is held at 0 after every step.

    Args:
        modules: that get an update.
        options: of the run.
        steps: of the run.
    """

    def __init__(self, modules: Iterable[nn.Linear], options: PrunedloraOptions, steps: int) -> None:
        ranks = {m: min(math.ceil(options.start * options.rank), widest(m)) for m in modules}
        updates: dict[nn.Module, Update] = {
            m: Update(*factors(m, rank), 1.0, options.dropout) for m, rank in ranks.items()
        }
        super().__init__(updates, options, steps)
        self._damping, self._trust = options.damping, options.trust
        self.alive: dict[nn.Module, Tensor] = {
            m: torch.ones(rank, dtype=torch.bool, device=m.weight.device) for m, rank in ranks.items()
        }

    def state(self) -> dict[str, Any]:
        """Return which ranks are left."""
        return {"alive": list(self.alive.values())}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for own, alive in zip(self.alive.values(), state["alive"], strict=True):
            own.copy_(alive)

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:  # noqa: ARG002 - signature of the hook
        """Take the cheapest ranks away, as many as the schedule says, and hold at 0 what is gone."""
        for module, update in self.updates().items():
            alive = self.alive[module]
            left = self._options.left(step, self._steps, (len(alive), self._options.rank), power=1)
            turned = masters.copy(update.b), masters.copy(update.a).T
            if left is not None and left < int(alive.sum()):
                self._cut(turned, (masters.gradient(update.b), masters.gradient(update.a).T), alive, left)
            for factor in turned:
                factor[:, ~alive] = 0.0

    def _cut(self, turned: tuple[Tensor, ...], grads: tuple[Tensor, ...], alive: Tensor, left: int) -> None:
        """Change both factors (ranks are columns) and `alive` in place, so that `left` ranks stay."""
        at = alive.nonzero().flatten()
        surgeons = [Surgeon(w[:, at], g[:, at], self._damping, self._trust) for w, g in zip(turned, grads, strict=True)]
        cost = torch.stack([surgeon.scores for surgeon in surgeons]).sum(0)
        gone = cost.argsort(stable=True)[: len(at) - left]
        for factor, surgeon in zip(turned, surgeons, strict=True):
            factor[:, at] = surgeon.without(gone)
        alive[at[gone]] = False


@RECOVERY.register(options=PrunedloraOptions, check=check, adapters=True)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: PrunedloraOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train wide updates, take ranks away on the way, merge what stays; the signature is that of the set.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    modules = projections(model, structure, options)

    def make(steps: int) -> Adapters:
        return Shrinking(modules.values(), options, steps)

    return tune(model, make, tokens, options, context)
