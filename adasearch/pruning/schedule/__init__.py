"""Pruning schedules: one file each.

An entry is ``decide(context: ScheduleContext, options) -> Decision``: which units of the whole model stay, found in one
go, layer by layer or in many small steps, and, where it compensates on its way, what the output projections become.
Facts: `compensates`, whether it does; `selects`, whether any selection may choose the units, or `top` alone; `sources`,
where the statistics may come from that it takes on its way, None for all (`accumulators.Source`); `learns`, whether it
trains, so that other weights than those of the base are cut (`_learning`); `check`, what is wrong with its options for
projections of given shapes, as of a recovery. Whatever the schedule, the widths meet the budget and the base weights
are only read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.config import TrialConfig
from adasearch.errors import ConfigError
from adasearch.pruning import allocation, compensation, importance, selection, surgery
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.learning import Learner
from adasearch.pruning.plan import Choose, PruningPlan, highest, make_plan
from adasearch.pruning.projection import project
from adasearch.pruning.statistics import ACCUMULATORS, Statistics, merged_from
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import SCHEDULE, Entry
from adasearch.sections import BudgetConfig

Output = tuple[Tensor, Tensor | None]
"""Weight (D × S, S features that stay) and bias (D) of an output projection."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """What a schedule decides.

    Args:
        plan: which units stay.
        outputs: compensated output projections by module name, of all groups that are cut; empty where compensation
            follows the cut.
        weights: parameters by full name, of dense shapes, that are cut in place of those of the base.
        statistics: of the model with these weights, as far as compensation needs any; None where they are the base's.
    """

    plan: PruningPlan
    outputs: Mapping[str, Output] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScheduleContext:
    """What a schedule decides from.

    Args:
        config: transformers config of the dense model.
        weights: parameters of the dense model by full name; never written to.
        structure: its groups.
        statistics: of the dense model, at least what `needs` says; None where nothing is needed.
        tokens: gives the calibration sample (N × T token ids), for statistics of a model that is partly cut.
        trial: criterion, allocation, compensation and schedule, with their options, and the seed.
        budget: what must go.
        device: where a model runs.
        train: trains a dense model with a learner's gates as the options of the schedule say, see
            `tuning.learning.learn`; needed by schedules that learn.
    """

    config: Any
    weights: Mapping[str, Tensor]
    structure: ModelStructure
    statistics: Statistics | None
    tokens: Callable[[], Tensor]
    trial: TrialConfig
    budget: BudgetConfig
    device: torch.device
    train: Callable[[nn.Module, Learner], object] | None = None

    @property
    def biases(self) -> tuple[str, ...]:
        """Return the output projections (module names) that compensation gives a bias."""
        return compensation.bias_modules(self.trial.compensation, self.structure)

    def part(self, name: str) -> ModelStructure:
        """Return the structure with the group called `name` as its only one."""
        group = self.structure.group(name)
        biases = {group.output: self.structure.output_biases[group.output]}
        return dataclasses.replace(self.structure, groups=(group,), output_biases=biases)

    def scores(self, statistics: Statistics | None, structure: ModelStructure | None = None) -> dict[str, Tensor]:
        """Return what the criterion makes of each group (U, float32, higher = keep) by name, given statistics.

        Raises:
            TrialError: a score is not finite (kind ``nan``).
        """
        return importance.score_all(
            structure or self.structure, self.weights, statistics, self.trial.importance, self.trial.seed
        )

    def choose(self, statistics: Statistics | None) -> Choose:
        """Return how the units of a group are chosen at its width, given statistics."""
        return selection.chooser(self.trial.selection, self.weights, statistics, self.trial.seed)

    def ratios(
        self, scores: Mapping[str, Tensor], statistics: Statistics | None, budget: BudgetConfig
    ) -> dict[str, float]:
        """Return the relative pruning ratio of each group by name, as the allocator sees it.

        Raises:
            ConfigError: the options leave too little to prune in this model.
        """
        seen = AllocationContext(
            structure=self.structure,
            budget=budget,
            scores=scores,
            statistics=statistics,
            weights=self.weights,
            biases=self.biases,
        )
        return allocation.shape(seen, self.trial.allocation)

    def plan(self, scores: Mapping[str, Tensor], *, part: float = 1.0, choose: Choose = highest) -> PruningPlan:
        """Return the plan at the widths that the allocator, seeing these scores, finds for a part of the budget.

        Args:
            scores: U by name of group, higher = keep.
            part: of what must go, in (0, 1].
            choose: says which units stay at a width.

        Raises:
            ConfigError: no widths meet the budget.
            TrialError: a score is not finite (kind ``nan``).
        """
        ratios = self.ratios(scores, self.statistics, self.budget)
        widths = project(self.structure, ratios, self.budget, self.biases, part=part)
        return make_plan(self.structure, self.trial.units, scores, widths, self.biases, choose)


def _entry(trial: TrialConfig) -> Entry:
    return SCHEDULE.get(trial.schedule.type)


def scored_from(trial: TrialConfig) -> frozenset[str]:
    """Return the families of statistics that widths and units follow from."""
    scored = importance.needs(trial.importance) | allocation.needs(trial.allocation)
    return scored | selection.needs(trial.selection)


def needs(trial: TrialConfig) -> frozenset[str]:
    """Return the families of statistics of the dense model that the steps of a trial read."""
    facts = _entry(trial).facts
    early = facts["compensates"] or facts["learns"]  # in time to look at a model of its own
    return scored_from(trial) | (frozenset() if early else compensation.needs(trial.compensation))


def check(trial: TrialConfig, where: str = "schedule") -> None:
    """Return when the schedule of a trial can have the statistics that its criterion and its compensation need.

    Raises:
        ConfigError: it cannot, with the first of them and the name of the component that needs it.
    """
    entry = _entry(trial)
    if trial.selection.type != "top" and not entry.facts["selects"]:
        problem = f"{entry.name} must have selection top: another one would bring back units that are gone"
        raise ConfigError(where, f"{problem}, given {trial.selection.type}; take one_shot or sequential")
    sources = entry.facts["sources"]
    if sources is None:
        return
    for component, found in (
        (trial.importance, importance.needs(trial.importance)),
        (trial.selection, selection.needs(trial.selection)),
        (trial.compensation, compensation.needs(trial.compensation)),
    ):
        for need in sorted(found):
            if not {ACCUMULATORS[family].source for family in merged_from(need)} <= sources:
                problem = f"{entry.name} must do with statistics of one forward pass through the layers, "
                raise ConfigError(where, f"{problem}but {component.type} needs {need}; take one_shot or iterative")


def decide(context: ScheduleContext) -> Decision:
    """Return what the schedule of the trial decides.

    Raises:
        ConfigError: no widths meet the budget, or the schedule cannot have the statistics that it needs.
        TrialError: a score, a statistic or a weight is not finite (kind ``nan``).
    """
    check(context.trial)
    decision: Decision = _entry(context.trial).function(context, context.trial.schedule.options)
    return decision


def cut(context: ScheduleContext, decision: Decision, whole: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return the model that a decision ends in, cut and compensated, on the device of the context.

    Args:
        context: that was decided from.
        decision: what came of it.
        whole: equal to the weights of the context, and the model's to keep, see `surgery.cut`.

    Raises:
        TrialError: the compensation is not finite (kind ``nan``).
    """
    weights = {**context.weights, **decision.weights}
    own = None if whole is None else {**whole, **decision.weights}
    model = surgery.cut(context.config, weights, context.structure, decision.plan, own).to(context.device)
    _compensate(model, context, decision, weights)
    return model


def _compensate(model: nn.Module, context: ScheduleContext, decision: Decision, weights: Mapping[str, Tensor]) -> None:
    """Compensate `model`, which was just cut from `weights`, in place, where the schedule has not done so yet."""
    if not _entry(context.trial).facts["compensates"]:
        statistics = decision.statistics or context.statistics
        compensation.apply(model, context.structure, decision.plan, statistics, weights, context.trial.compensation)
        return
    with torch.no_grad():
        for name, (weight, bias) in decision.outputs.items():
            module = model.get_submodule(name)
            for tensor, new in ((module.weight, weight), (module.bias, bias)):
                if new is not None:
                    assert isinstance(tensor, Tensor), f"{name} must have a bias: the plan lists {decision.plan.biases}"
                    tensor.copy_(new)
