"""One shot: everything is decided by the statistics of the dense model, and goes at once."""

from __future__ import annotations

from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.registry import SCHEDULE, NoOptions


@SCHEDULE.register(compensates=False, selects=True, sources=None, learns=False)
def decide(context: ScheduleContext, options: NoOptions) -> Decision:  # noqa: ARG001 - the set's signature
    """Return scores, then widths on the budget, then the units of each group.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score is not finite (kind ``nan``).
    """
    scores = context.scores(context.statistics)
    return Decision(plan=context.plan(scores, choose=context.choose(context.statistics)))
