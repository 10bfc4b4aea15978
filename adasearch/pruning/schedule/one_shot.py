"""One shot: everything is decided by the statistics of the dense model, and goes at once."""

from __future__ import annotations

from adasearch.pruning.plan import make_plan
from adasearch.pruning.projection import project
from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.registry import SCHEDULE, NoOptions


@SCHEDULE.register(compensates=False, selects=True, sources=None)
def decide(context: ScheduleContext, options: NoOptions) -> Decision:  # noqa: ARG001 - the set's signature
    """Return scores, then widths on the budget, then the units of each group.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score is not finite (kind ``nan``).
    """
    scores = context.scores(context.statistics)
    ratios = context.ratios(scores, context.statistics, context.budget)
    widths = project(context.structure, ratios, context.budget, context.biases)
    choose = context.choose(context.statistics)
    return Decision(plan=make_plan(context.structure, context.trial.units, scores, widths, context.biases, choose))
