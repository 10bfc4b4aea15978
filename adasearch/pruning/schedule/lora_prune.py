"""LoRAPrune: units are masked more and more while LoRA trains, judged by gradients that its factors tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasearch.documents import Count, Share, value
from adasearch.pruning.learning import LowRank, RampOptions, check_rank
from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.pruning.schedule._learning import Ramped, Training, prior
from adasearch.pruning.structure import Group
from adasearch.registry import SCHEDULE


@value
class LoraPruneOptions(RampOptions):
    """Settings of LoRAPrune beside those of all that mask on their way.

    Args:
        rank: of the updates, which all projections get.
        decay: of the running mean of scores.
        prior: weight of the criterion's scores, of norm 1 in each group, as the first scores.
    """

    rank: Count = 8
    decay: Share = 0.9


def unit_scores(group: Group, weights: Mapping[str, Tensor], updates: Mapping[str, LowRank]) -> Tensor:
    """Return the scores of one step (U, float32): LoRAPrune (arXiv 2305.18403), equations 8 to 10.

    The gradient of a weight is told from those of its update's factors, G = gB A + B gA - gB gA, which needs no
    gradient of the frozen weight. A weight scores |G (W + scale B A)|; the scores of a row or column that a unit owns
    add up, every matrix's vector is divided by its norm, and those of a unit's matrices add up.

    Args:
        group: whose units are scored.
        weights: frozen weights by parameter name.
        updates: by module path, after a backward pass; matrices without one say nothing.
    """
    device = next(iter(updates.values())).a.device
    total = torch.zeros(group.units, device=device)
    for piece in group.slices:
        update = updates.get(piece.parameter.removesuffix(".weight"))
        if update is None or update.a.grad is None or update.b.grad is None:
            continue
        a, b, ga, gb = (t.detach().float() for t in (update.a, update.b, update.a.grad, update.b.grad))
        gradient = gb @ (a - ga) + b @ ga
        weight = torch.addmm(weights[piece.parameter].float(), b, a, alpha=update.scale)
        lines = gradient.mul_(weight).abs_().sum(1 - piece.dim)
        lines /= torch.linalg.vector_norm(lines).clamp_min(torch.finfo(torch.float32).tiny)
        total += lines.view(group.units, piece.block).sum(1)
    return total


class _Judged(Ramped):
    """Scores are running means of `unit_scores`."""

    def __init__(self, context: ScheduleContext, options: LoraPruneOptions, weights: Mapping[str, Tensor]) -> None:
        super().__init__(context, options)
        self._decay, self._weights = options.decay, weights
        start = prior(context, "l2")
        self._scores = {name: options.prior * part for name, part in start.items()}

    def scores(self) -> dict[str, Tensor]:
        return {name: part.cpu() for name, part in self._scores.items()}

    def gates(self, done: float) -> dict[str, Tensor]:
        return self.masks(done)

    @torch.no_grad()
    def graded(self, updates: Mapping[str, LowRank]) -> None:
        for group in self._context.structure.groups:
            found = unit_scores(group, self._weights, updates)
            if bool(found.isfinite().all()):  # a step that overflowed says nothing
                self._scores[group.name].lerp_(found, 1 - self._decay)


@SCHEDULE.register(
    options=LoraPruneOptions, compensates=False, selects=False, sources=None, learns=True, check=check_rank
)
def decide(context: ScheduleContext, options: LoraPruneOptions) -> Decision:
    """Return the units that are unmasked when the training ends, updates merged: LoRAPrune (arXiv 2305.18403).

    Frozen weights, LoRA on all projections, masks on units along a cubic ramp. The published one has `prior` 0, rank 8,
    `every` 10 and a uniform allocation over all layers but the first tenth and the last. Ours is that the allocator may
    be any, and that masks zero what a unit adds to the residual stream: the masked model is the one that is cut.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score or a loss is not finite (kind ``nan``), or the text or the teacher cannot be had.
    """
    training = Training(context)
    learner = _Judged(context, options, dict(training.model.named_parameters()))
    context.plan(learner.scores())  # a budget that cannot be met is told before any training
    training.run(learner)
    return training.end(learner.plan())
