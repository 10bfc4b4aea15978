"""A budget in latency or memory, brought to one in parameters: the least cut whose predicted cost is the target.

There is one allocation and one projection, those of a budget in parameters. What is searched here, by bisection, is the
fraction that they are told to remove: the cost follows from the widths that come out. So a trial is as wide as its own
ratios make it, and all trials of a study cost the same by prediction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch import costs, latencies
from adasearch.config import StudyConfig, TrialConfig
from adasearch.errors import ConfigError
from adasearch.latencies import Conditions, LatencyTable
from adasearch.pruning import architectures, compensation
from adasearch.pruning.projection import project, reachable
from adasearch.pruning.schedule import ScheduleContext
from adasearch.pruning.structure import ModelShape, ModelStructure, Outline
from adasearch.sections import BudgetConfig, Goal

if TYPE_CHECKING:
    from adasearch.pruning.plan import PruningPlan
    from adasearch.workbench import Workbench

_STEPS = 10**6
"""A fraction is found to so many parts of the whole."""
Ratios = Callable[[BudgetConfig], Mapping[str, float]]
Share = Callable[[ModelStructure, Mapping[str, int], Collection[str]], float]
"""From a structure, widths by group name and added biases to a cost, as a fraction of the dense model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What a budget is counted in, when not in parameters.

    Args:
        goal: the cost.
        target: what may be left of it.
        share: predicts what is.
    """

    goal: Goal
    target: float
    share: Share


def folder_of(cache: Path) -> Path:
    """Return where latency tables are kept, beside the statistics."""
    return cache / "latency"


def memory_share(tokens: int, dense: ModelShape, shape_of: Callable[[Outline], ModelShape]) -> Share:
    """Return what counts weights and key-value cache of a sequence of `tokens`, see `costs.memory`.

    Args:
        tokens: of the sequence.
        dense: shape of the dense model.
        shape_of: gives that of what an outline leaves of it.
    """

    def share(structure: ModelStructure, widths: Mapping[str, int], biases: Collection[str]) -> float:
        left = structure.count(widths, structure.added(biases))
        keep = {g.name: range(widths.get(g.name, g.width) * g.partitions) for g in structure.groups}
        own = costs.memory(left, costs.cache_elements(shape_of(structure.outline), structure, keep), tokens, 1)
        whole = structure.dense
        return own / costs.memory(whole.parameters, costs.cache_elements(dense, whole, {}), tokens, 1)

    return share


def yardstick(budget: BudgetConfig, counted: Share, table: Callable[[], LatencyTable]) -> Yardstick | None:
    """Return what a budget is counted in, None where it is in parameters already.

    Args:
        budget: of a study or trial.
        counted: counts memory, see `memory_share`.
        table: gives the latency table, which may have to be measured first.
    """
    if budget.goal is None:
        return None
    name, target = budget.goal
    if name == "memory":
        return Yardstick(goal=name, target=target, share=counted)
    found = table()
    return Yardstick(goal=name, target=target, share=lambda structure, widths, _: found.share(structure, widths))


def of_bench(config: TrialConfig, bench: Workbench) -> Yardstick | None:
    """Return what the budget of a trial is counted in, None for parameters."""
    base, tokens = bench.base, bench.study.objective.latency_tokens
    dtype = str(base.dtype).removeprefix("torch.")

    def table() -> LatencyTable:
        told = Conditions(device=bench.device.type, dtype=dtype, threads=bench.threads, tokens=tokens)
        return latencies.table(base.config, base.shape, config.units, told, folder_of(bench.cache))

    counted = memory_share(tokens, base.shape, lambda outline: bench.outlined(outline).shape)
    return yardstick(bench.study.budget_of(config), counted, table)


def resolve(
    structure: ModelStructure, ratios: Ratios, budget: BudgetConfig, biases: Collection[str], yard: Yardstick
) -> BudgetConfig:
    """Return the budget in parameters, the least at which the predicted cost is at most the target.

    By bisection over the fraction to remove: a wider model never costs less by prediction, and the more goes, the
    narrower each group is, but for what rounding moves between groups. The fraction that is found meets the target;
    one that is a millionth less does not, or its ratios say otherwise.

    Args:
        structure: what the widths are cut from.
        ratios: relative ratios of groups under a budget in parameters, see `allocation.shape`.
        budget: with a goal; all else that it says stays.
        biases: output projections (module names) that compensation gives a bias.
        yard: what it is counted in.

    Raises:
        ConfigError: no widths meet the target; the message holds the least that can be met.
    """
    if yard.share(structure, structure.dense_widths(), biases) <= yard.target:
        return budget.removing(0.0)
    low, high, least, why = 0, math.floor(reachable(structure, budget, biases) * _STEPS) + 1, 1.0, ""
    found: BudgetConfig | None = None
    while high - low > 1:
        middle = (low + high) // 2
        trial = budget.removing(middle / _STEPS)
        try:
            share = yard.share(structure, project(structure, ratios(trial), trial, biases), biases)
        except ConfigError as error:  # no such fraction can go, by these ratios
            high, why = middle, f" ({error})"
            continue
        least = min(least, share)
        if share <= yard.target:
            high, found = middle, trial
        else:
            low = middle
    if found is None:
        shown = math.ceil(1000 * least) / 1000
        problem = f"must be at least {shown:g} here, embeddings and norms stay{why}, given {yard.target:g}"
        raise ConfigError(f"budget.{yard.goal}", problem)
    return found


def evenly(structure: ModelStructure, budget: BudgetConfig, biases: Collection[str], yard: Yardstick) -> BudgetConfig:
    """Return the budget in parameters for equal ratios everywhere: what is known of it before there is a trial.

    Raises:
        ConfigError: no widths meet the target.
    """
    return resolve(structure, lambda _: dict.fromkeys(structure.dense_widths(), 1.0), budget, biases, yard)


def of_study(study: StudyConfig, config: Any, shape: ModelShape, told: Conditions, cache: Path) -> BudgetConfig:
    """Return the budget of a study in parameters, for equal ratios, its latencies measured here where need be.

    Args:
        study: with a goal.
        config: transformers config of the dense model.
        shape: of the same.
        told: the conditions of its workers.
        cache: of the run.

    Raises:
        ConfigError: no widths meet the target.
        ModelError: nothing could be measured.
    """
    trial = TrialConfig.from_dict(study.trial, "trial")
    structure = architectures.describe(shape, trial.units)
    yard = yardstick(
        study.budget,
        memory_share(told.tokens, shape, lambda _: shape),
        lambda: latencies.table(config, shape, trial.units, told, folder_of(cache)),
    )
    assert yard is not None, "the study has a budget in parameters"
    return evenly(structure, study.budget, compensation.bias_modules(trial.compensation, structure), yard)


def before_widths(config: TrialConfig, bench: Workbench) -> BudgetConfig:
    """Return the budget that bounds what leaves before the widths: one in parameters, by equal ratios if need be.

    Raises:
        ConfigError: no widths meet the target.
    """
    budget, yard = bench.study.budget_of(config), of_bench(config, bench)
    if yard is None:
        return budget
    structure = bench.structure(config.units)
    return evenly(structure, budget, compensation.bias_modules(config.compensation, structure), yard)


def met(context: ScheduleContext, yard: Yardstick | None) -> ScheduleContext:
    """Return what a schedule decides from, its budget in parameters: as much as the trial's own ratios need.

    The ratios are those that its allocator gives for the statistics at hand, as in one shot. A schedule of many steps
    measures anew between them, and its widths may come out a little above or below the target.

    Raises:
        ConfigError: no widths meet the target.
        TrialError: a score is not finite (kind ``nan``).
    """
    if yard is None:
        return context
    if yard.goal == "latency" and context.structure.outline.hidden is not None:
        raise ConfigError(
            "hidden", "must be none under budget.latency, whose table holds for the model's own hidden size"
        )
    scores = context.scores(context.statistics)

    def ratios(budget: BudgetConfig) -> Mapping[str, float]:
        return context.ratios(scores, context.statistics, budget)

    budget = resolve(context.structure, ratios, context.budget, context.biases, yard)
    return dataclasses.replace(context, budget=budget)


def notes(yard: Yardstick | None, structure: ModelStructure, plan: PruningPlan) -> dict[str, float]:
    """Return what the widths of a plan cost by prediction, as a fraction of the dense model's; {} for parameters."""
    if yard is None:
        return {}
    return {f"{yard.goal}_predicted": yard.share(structure, plan.widths(structure), plan.biases)}
