"""Iterative: a little goes at a time, and the model that is left is measured anew before every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adasearch.documents import Count, value
from adasearch.pruning import calibration, surgery
from adasearch.pruning.plan import PruningPlan, make_plan
from adasearch.pruning.projection import on_budget, project, removal
from adasearch.pruning.schedule import Decision, ScheduleContext, scored_from
from adasearch.pruning.statistics import Statistics
from adasearch.registry import SCHEDULE

_HARDLY = 1e-6
"""Claim, in units, of a group that has had its share: it goes on only where the others have nothing left."""


@value
class IterativeOptions:
    """Settings.

    Args:
        steps: T, number of equal steps in which the budget is reached.
    """

    steps: Count = 10


def _measured(context: ScheduleContext, plan: PruningPlan | None) -> Statistics | None:
    """Return the statistics of the model as cut by `plan`, all shapes dense; None is the dense model."""
    wanted = scored_from(context.trial)
    if plan is None or not wanted:
        return context.statistics
    model = surgery.zeroed(context.config, context.weights, context.structure, plan).to(context.device)
    return calibration.collect(model, context.structure, context.tokens(), wanted)


def _staying(context: ScheduleContext, plan: PruningPlan | None) -> dict[str, Tensor]:
    """Return which units (U, bool) of each group are still there, by name."""
    found = {g.name: torch.ones(g.units, dtype=torch.bool) for g in context.structure.groups}
    for name, keep in (plan.keep if plan else {}).items():
        found[name] = torch.zeros_like(found[name]).index_fill(0, torch.tensor(keep), 1)
    return found


def _claims(
    context: ScheduleContext, scores: Mapping[str, Tensor], statistics: Statistics | None, step: int, steps: int
) -> dict[str, float]:
    """Return the fraction of each dense group, by name, that step `step` (from 1) of `steps` takes, not rounded.

    It is by how much the ratios that the allocator gives for t / T of the budget exceed those for (t - 1) / T.
    """

    def share(t: int) -> dict[str, float]:
        if not t:
            return dict.fromkeys(context.structure.dense_widths(), 0.0)
        budget = context.budget.removing(context.budget.fraction * (t / steps))
        need = removal(context.structure, context.budget, context.biases) * t / steps
        return on_budget(context.structure, context.ratios(scores, statistics, budget), need)

    before, after = share(step - 1), share(step)
    return {name: after[name] - before[name] for name in after}


def _widths(
    context: ScheduleContext, claimed: Mapping[str, float], before: Mapping[str, int], part: float
) -> dict[str, int]:
    """Return widths at which `part` of what must go is gone, none above those `before`, by group name.

    Args:
        context: has structure and budget.
        claimed: fraction of each dense group that should be gone by now.
        before: widths so far.
        part: in (0, 1].

    Raises:
        ConfigError: no widths meet the budget.
    """
    ratios = {}
    for group in context.structure.groups:
        units = claimed[group.name] * group.width - (group.width - before[group.name])
        ratios[group.name] = max(units, _HARDLY) / before[group.name] if claimed[group.name] > 0 else 0.0
    return project(context.structure, ratios, context.budget, context.biases, before, part)


@SCHEDULE.register(options=IterativeOptions, compensates=False, selects=False, sources=None, learns=False)
def decide(context: ScheduleContext, options: IterativeOptions) -> Decision:
    """Return which units stay after T steps, each of which removes 1 / T of what must go: Adapt-Pruner.

    Before each step statistics are taken from the model as cut so far; criterion and allocator see them anew. A step
    adds to the fraction s_g that is gone of a group what the allocator's ratios grow by from (t - 1) / T of the budget
    to t / T of it; under `cosine_linear` that is s_l(t) = s_l(t - 1) + (s / T) (1 - a I_l(t)), the law of Adapt-Pruner
    (arXiv 2502.03460). What is lost in rounding to units is carried on, and widths never rise: where an allocator
    takes back what it took, the group stays as it is. While statistics stay the same, the ratios are those of one
    shot, whatever the allocator. A unit that went is out for good; allocators see the score that it went with.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score or a statistic is not finite (kind ``nan``).
    """
    return Decision(plan=in_steps(context, options.steps, lambda fresh, _: fresh))


Refine = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
"""Gives scores by group from those of the criterion, and from which units (U, bool) are still there."""


def in_steps(context: ScheduleContext, steps: int, refine: Refine) -> PruningPlan:
    """Return the plan of `steps` steps, whose scores go through `refine`; errors as in `decide`."""
    structure, trial = context.structure, context.trial
    plan: PruningPlan | None = None
    scores: dict[str, Tensor] = {}
    claimed = dict.fromkeys(structure.dense_widths(), 0.0)
    for step in range(1, steps + 1):
        statistics, there = _measured(context, plan), _staying(context, plan)
        fresh = refine(context.scores(statistics), there)
        scores = {name: new.where(there[name], scores.get(name, new)) for name, new in fresh.items()}
        gains = _claims(context, scores, statistics, step, steps)
        claimed = {name: claimed[name] + max(0.0, gain) for name, gain in gains.items()}
        before = plan.widths(structure) if plan else structure.dense_widths()
        last = step == steps
        widths = _widths(context, claimed, before, step / steps)
        lowest = torch.finfo(torch.float32).min
        standing = {name: old.masked_fill(~there[name], lowest) for name, old in scores.items()}
        plan = make_plan(structure, trial.units, standing, widths, context.biases if last else ())
    assert plan is not None
    return plan
