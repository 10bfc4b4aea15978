"""What the schedules share that learn by training which units stay (`learning.Learner`).

They are schedules, and no recoveries, though some tune weights on their way. A recovery is exchanged when a search is
finished, for a longer one: had it decided the cut, the finalist would be another model than the one that was scored. As
a schedule it goes with every allocation, compensation and recovery; the budget is met by the same projection; and what
a trial measures between its cut and its recovery is measured as ever.

They end in weights of the dense shape, into which gates are folded. Those are cut, and compensation, where a trial asks
for it, makes up for what the cut takes away from that model: of units whose gates are 0 it is nothing.

Shape letters: U units of a group, D hidden size, F input features of an output projection.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adasearch import models
from adasearch.pruning import calibration, compensation
from adasearch.pruning.learning import Learner, RampOptions
from adasearch.pruning.plan import PruningPlan
from adasearch.pruning.reduction import Normalise, normalised
from adasearch.pruning.schedule import Decision, ScheduleContext


def prior(context: ScheduleContext, how: Normalise) -> dict[str, Tensor]:
    """Return what the criterion makes of each group (U, float32, on the device) by name, its scores made comparable.

    Raises:
        TrialError: a score is not finite (kind ``nan``).
    """
    found = context.scores(context.statistics)
    return {name: normalised(part, how).float().to(context.device) for name, part in found.items()}


def masks(context: ScheduleContext, plan: PruningPlan) -> dict[str, Tensor]:
    """Return 1 for units that stay and 0 for the others (U, float32), by name of the groups that are cut."""
    found = {}
    for group in context.structure.groups:
        keep = plan.keep[group.name]
        if len(keep) < group.units:
            mask = torch.zeros(group.units, device=context.device)
            found[group.name] = mask.index_fill_(0, torch.tensor(keep, device=context.device), 1.0)
    return found


class Training:
    """The dense model of a schedule on its way from the base weights, which it only reads, to those that are cut.

    Args:
        context: of the schedule.
    """

    def __init__(self, context: ScheduleContext) -> None:
        self._context = context
        model = models.assemble(models.empty_model(context.config), context.weights)
        self.model = model.requires_grad_(requires_grad=False).to(context.device)

    def run(self, learner: Learner) -> None:
        """Train as the options of the schedule say.

        Raises:
            TrialError: a loss is not finite (kind ``nan``), or the text or the teacher cannot be had.
        """
        assert self._context.train is not None, "this schedule must be given a way to train"
        self._context.train(self.model, learner)

    def end(self, plan: PruningPlan) -> Decision:
        """Return what was decided, with the weights that changed."""
        context, model = self._context, self.model
        wanted = compensation.needs(context.trial.compensation)
        statistics = calibration.collect(model, context.structure, context.tokens(), wanted) if wanted else None
        return Decision(plan=plan, weights=changed(model, context.weights), statistics=statistics)


def changed(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model that differ from `weights`, by name and on the device of those."""
    found = {}
    for name, weight in model.named_parameters():
        base = weights[name]
        there = weight.detach().to(base.device)
        if there.data_ptr() != base.data_ptr() and not torch.equal(there, base):
            found[name] = there
    return found


class Ramped(Learner):
    """Masks more and more units, those of the lowest scores, until the budget is met.

    How much goes of which group is for the trial's allocator to say, which sees the scores as they are; a unit that is
    masked comes back when its score rises.

    Args:
        context: of the schedule.
        options: the ramp.

    Raises:
        ConfigError: no widths meet the budget.
    """

    def __init__(self, context: ScheduleContext, options: RampOptions) -> None:
        self._context, self._options = context, options
        self._count, self._part = 0, 0.0
        self._plan: PruningPlan | None = None
        self._masks: dict[str, Tensor] = {}

    @abc.abstractmethod
    def scores(self) -> dict[str, Tensor]:
        """Return what is known of the units by now (U, float32, higher = keep) by name of group."""

    def masks(self, done: float) -> dict[str, Tensor]:
        """Return the masks of the next step by name of group, see `masks`."""
        part = self._options.part(done)
        if part > 0 and (self._plan is None or part >= 1.0 > self._part or self._count % self._options.every == 0):
            self._plan, self._part = self._context.plan(self.scores(), part=part), part
            self._masks = masks(self._context, self._plan)
        self._count += 1
        return self._masks

    def plan(self) -> PruningPlan:
        """Return which units the last masks leave."""
        assert self._plan is not None, "the ramp must have begun"
        return self._plan
