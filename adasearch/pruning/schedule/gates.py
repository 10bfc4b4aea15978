"""Gates: deterministic, differentiable gates on the units of a frozen model learn which of them stay (DDP)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adasearch.documents import NonNegative, Positive, value
from adasearch.pruning.learning import Learner, LearningOptions, LowRank
from adasearch.pruning.plan import make_plan
from adasearch.pruning.projection import removal
from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.pruning.schedule._learning import Training, prior
from adasearch.registry import SCHEDULE

_SLOPE, _STRETCH = 2.39, 0.1
"""C0, published as about 2.4, and the stretch of `retention`: it is 0 near z = 0 and 1 near z = 2 mu. Below ln 11 both
ends are inside, so that a gate there still feels a pull."""


@value
class GatesOptions(LearningOptions):
    """Settings of gates beside those of all that learn; a gate starts at 1 - `prior` (1 - rank by the criterion).

    Args:
        lr: of the gates; over a run they can move about half its sum.
        distill: weight of KL(dense || gated) beside the next-token loss.
        scope: ``group`` has the allocator say, before any learning, how much stays of each group, and the gates which
            units; ``joint`` has one constraint over all units, by parameters, and the allocator sees the gates at the
            end: take `global_score` without normalisation.
        soft: mu of the retention score at the start; above 1 / 2, so that gates of 1 feel a pull.
        sharp: mu at the end.
        penalty: weight of the squared gap to what shall stay, over the mean gradient of a gate.
        ascent: of the gap's multiplier over the whole run, at a gap of 1, in the same unit.
        binary: weight of s (1 - s), in the same unit.
    """

    lr: Positive = 0.05
    distill: NonNegative = 2.0
    scope: Literal["group", "joint"] = "group"
    soft: Positive = 0.6
    sharp: Positive = 0.1
    penalty: NonNegative = 6.0
    ascent: NonNegative = 20.0
    binary: NonNegative = 0.5


def retention(z: Tensor, mu: float) -> Tensor:
    """Return how far units are kept, s = clamp(1.2 sigmoid((z - mu) C0 / mu) - 0.1, 0, 1), of the shape of z."""
    return (torch.sigmoid((z - mu) * (_SLOPE / mu)) * (1 + 2 * _STRETCH) - _STRETCH).clamp(0.0, 1.0)


@dataclass(slots=True, kw_only=True, eq=False)
class Constraint:
    """What share of some groups shall stay, by parameters.

    Args:
        names: of the groups.
        share: that shall stay.
        weight: of this constraint among all; they add up to 1.
        multiplier: of Lagrange, moved by dual ascent.
    """

    names: tuple[str, ...]
    share: float
    weight: float
    multiplier: float = 0.0


class Gates(Learner):
    """Gates m = relu(z) on units, and what pulls them to the budget.

    Args:
        z: one vector (U) for every gated group by name.
        costs: parameters of one unit by name of group.
        constraints: on these groups.
        options: of the schedule.
    """

    def __init__(
        self,
        z: Mapping[str, nn.Parameter],
        costs: Mapping[str, int],
        constraints: list[Constraint],
        options: GatesOptions,
    ) -> None:
        self._z, self._costs, self._options = dict(z), costs, options
        self.constraints = constraints
        self._done = self._progress = 0.0
        self._gaps: list[float] = []
        self._scale: float | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Return z."""
        return list(self._z.values())

    def gates(self, done: float) -> dict[str, Tensor]:
        """Return relu(z)."""
        self._progress, self._done = done - self._done, done
        return {name: z.relu() for name, z in self._z.items()}

    @property
    def mu(self) -> float:
        """Return mu_t = mu_0 - (mu_0 - mu_T) (p + sin(pi p) / pi), p the share of the steps.

        The last factor is the part of all learning rates of a cosine that is spent by then: mu falls as gates can move.
        Gates above 2 mu feel no pull, and the published root of p outruns them in short runs.
        """
        soft, sharp = self._options.soft, self._options.sharp
        return soft - (soft - sharp) * (self._done + math.sin(math.pi * self._done) / math.pi)

    def _parts(self, constraint: Constraint) -> tuple[Tensor, Tensor]:
        """Return the retention scores of a constraint's units and the share of each in their parameters."""
        scores = [retention(self._z[name], self.mu) for name in constraint.names]
        costs = [torch.full_like(s, self._costs[n]) for n, s in zip(constraint.names, scores, strict=True)]
        shares = torch.cat(costs)
        return torch.cat(scores), shares / shares.sum()

    def penalty(self) -> Tensor | None:
        """Return scale x (sum over constraints of w (l gap + p gap^2 / 2 + b mean s (1 - s))), None in the first step.

        The gap is the mean of s less the share that shall stay. The scale is the sum over units of the size of the
        first step's gradient, so that weights mean the same in a model of any size and loss.
        """
        if self._scale is None:
            return None
        total, self._gaps = torch.zeros(()), []
        for constraint in self.constraints:
            s, shares = self._parts(constraint)
            gap = (shares * s).sum() - constraint.share
            pull = constraint.multiplier * gap + self._options.penalty / 2 * gap.square()
            pull = pull + self._options.binary * (shares * s * (1 - s)).sum()
            total = total.to(pull.device) + constraint.weight * pull
            self._gaps.append(float(gap.detach()))
        return self._scale * total

    def graded(self, updates: Mapping[str, LowRank]) -> None:  # noqa: ARG002 - there are none
        """Take the scale from the first gradient; let the multipliers follow the gaps."""
        if self._scale is None:
            self._scale = math.fsum(float(z.grad.abs().sum()) for z in self._z.values() if z.grad is not None)
        for constraint, gap in zip(self.constraints, self._gaps, strict=False):
            constraint.multiplier += self._options.ascent * self._progress * gap


def _constraints(context: ScheduleContext, widths: Mapping[str, int], scope: str) -> list[Constraint]:
    """Return one constraint for every group that is to be cut, or one for all groups."""
    sizes = {g.name: g.width * g.step_cost for g in context.structure.groups}
    if scope == "joint":
        need = max(0, removal(context.structure, context.budget, context.biases))
        return [Constraint(names=tuple(sizes), share=1 - need / sum(sizes.values()), weight=1.0)]
    cut = [g for g in context.structure.groups if widths[g.name] < g.width]
    total = sum(sizes[g.name] for g in cut)
    return [Constraint(names=(g.name,), share=widths[g.name] / g.width, weight=sizes[g.name] / total) for g in cut]


@SCHEDULE.register(options=GatesOptions, compensates=False, selects=False, sources=None, learns=True)
def decide(context: ScheduleContext, options: GatesOptions) -> Decision:
    """Return the units whose gates stay open, the gates folded into what reads them: DDP (arXiv 2603.08065).

    Weights are frozen. A unit is multiplied by m = relu(z), which may exceed 1, and a score s (`retention`) that
    sharpens on the way says how far it counts as kept; the loss is CE + eta KL(dense || gated) plus what pulls the
    mean of s, by parameters, to the budget. There is no noise, so the gated model is the one that is cut. Ours are the
    scale of that pull, its augmented Lagrangian with dual ascent on the multiplier alone, the pace of the sharpening,
    the start from a criterion, and the cut itself: it keeps the units of the largest z at widths that meet the budget.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score or a loss is not finite (kind ``nan``), or the text or the teacher cannot be had.
    """
    structure, training = context.structure, Training(context)
    start = prior(context, "rank")
    widths = context.plan(context.scores(context.statistics)).widths(structure)
    constraints = _constraints(context, widths, options.scope)
    names = [name for constraint in constraints for name in constraint.names]
    z = {name: nn.Parameter(1 - options.prior * (1 - start[name])) for name in names}
    if z:
        training.run(Gates(z, {g.name: g.unit_cost for g in structure.groups}, constraints, options))
    learned = {name: part.detach().cpu() for name, part in {**start, **z}.items()}
    if options.scope == "joint":
        plan = context.plan(learned)
    else:
        plan = make_plan(structure, context.trial.units, learned, widths, context.biases)
    return training.end(plan)
