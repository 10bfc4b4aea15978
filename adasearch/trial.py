"""One trial: configuration -> smaller model -> score. The pipeline on one screen.

describe -> calibrate -> score -> allocate -> plan -> cut + compensate -> recover -> evaluate
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adasearch import registry
from adasearch.config import Component, TaskScore, TrialConfig, TrialResult
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning import allocation, compensation, importance, surgery
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.plan import PruningPlan, make_plan
from adasearch.pruning.projection import project
from adasearch.tuning import evaluation, scoring
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport

if TYPE_CHECKING:
    from torch import nn

    from adasearch.pruning.statistics import Statistics
    from adasearch.pruning.structure import ModelStructure
    from adasearch.workbench import TaskItems, Workbench

Observer = Callable[[str, float | None], None]
TaskValues = dict[str, np.ndarray]


def silent(_phase: str, _progress: float | None) -> None:
    """Observe nothing."""


class Clock:
    """Seconds spent in each phase; tells an observer when a phase begins and how far it is."""

    def __init__(self, observer: Observer = silent) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = ""
        self._observer = observer
        self._since = time.perf_counter()

    def enter(self, phase: str, progress: float | None = None) -> None:
        """End the current phase and begin `phase`; the same phase again only reports progress."""
        if phase != self.phase:
            now = time.perf_counter()
            if self.phase:
                self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + now - self._since, 3)
            self.phase, self._since = phase, now
        self._observer(phase, progress)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pruned:
    """A model after the cut, and the decision that led to it."""

    model: nn.Module
    structure: ModelStructure
    plan: PruningPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """What scoring gave: scores by task, the value of each item, and the estimate of the objective.

    Args:
        stopped: the model was behind its rival with confidence before all items were scored.
    """

    tasks: tuple[TaskScore, ...]
    values: TaskValues
    score: float
    stderr: float
    stopped: bool


def needs_of(config: TrialConfig) -> frozenset[str]:
    """Return the families of statistics that the steps of a trial read."""
    scored = importance.needs(config.importance) | allocation.needs(config.allocation)
    return scored | compensation.needs(config.compensation)


def decide(
    config: TrialConfig, bench: Workbench, structure: ModelStructure, statistics: Statistics | None
) -> PruningPlan:
    """Return which units stay: scores, then widths on the budget, then the best units of each group."""
    budget = bench.study.budget
    scores = importance.score_all(structure, bench.base.weights, statistics, config.importance, config.seed)
    biases = compensation.bias_modules(config.compensation, structure)
    context = AllocationContext(structure=structure, budget=budget, scores=scores, statistics=statistics, biases=biases)
    try:
        widths = project(structure, allocation.shape(context, config.allocation), budget, biases)
    except ConfigError as error:
        # One shape of ratios that cannot reach the budget is no reason to end a search.
        raise TrialError("config", str(error), "plan") from error
    return make_plan(structure, config.units, scores, widths, biases)


def prune(config: TrialConfig, bench: Workbench, clock: Clock) -> Pruned:
    """Return the model cut to the budget and compensated, not yet recovered."""
    structure = bench.structure(config.units)
    clock.enter("calibrate")
    statistics = bench.statistics(structure, config.calibration, config.units, needs_of(config))
    clock.enter("plan")
    plan = decide(config, bench, structure, statistics)
    clock.enter("cut")
    model = surgery.cut(bench.base.config, bench.base.weights, structure, plan).to(bench.device)
    compensation.apply(model, structure, plan, statistics, bench.base.weights, config.compensation)
    return Pruned(model=model, structure=structure, plan=plan)


def recover(pruned: Pruned, recovery: Component, config: TrialConfig, bench: Workbench, clock: Clock) -> RecoveryReport:
    """Tune the smaller model in place and return what was done."""
    clock.enter("recover")
    tokens = bench.recovery_tokens(recovery, config.calibration.corpus, config.seed)
    context = RecoveryContext(
        seed=config.seed,
        device=str(bench.device),
        report=lambda step, total, _loss: clock.enter("recover", step / total),
        teacher=bench.dense() if getattr(recovery.options, "distill", 0.0) > 0 else None,
    )
    entry = registry.RECOVERY.get(recovery.type)
    report: RecoveryReport = entry.function(pruned.model, pruned.structure, tokens, recovery.options, context)
    return report


def paired_gap(values: TaskValues, rival: TaskValues) -> tuple[float, float]:
    """Return the mean difference to `rival` and its standard error: items paired, tasks weighing the same.

    Args:
        values: item values by task (n-vectors).
        rival: the same of another model, at least as many items of each task, in the same order.
    """
    gaps = [mine - rival[task][: len(mine)] for task, mine in values.items()]
    means = [gap.mean() for gap in gaps]
    variances = [gap.var(ddof=1) / len(gap) if len(gap) > 1 else 0.0 for gap in gaps]
    return float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(gaps))


def comparable(rival: TaskValues | None, counts: dict[str, int]) -> bool:
    """Return whether `rival` holds every item of every task, so that a race against it is fair."""
    return rival is not None and all(task in rival and len(rival[task]) == n for task, n in counts.items())


def evaluate(model: nn.Module, bench: Workbench, clock: Clock, rival: TaskValues | None = None) -> Evaluated:
    """Score a model on the search items, block by block; stop where it is behind `rival` with confidence.

    After each of `racing.rungs` the model stops when gap + z * error < 0, with the paired gap to the rival. Its score
    is then estimated as the rival's score plus the gap: all trials are compared on the same footing.

    Args:
        model: any causal language model.
        bench: holds the items.
        clock: told of the progress.
        rival: item values of the best trial so far, None to score every item.
    """
    metric, racing = bench.study.objective.metric, bench.study.racing
    tasks = bench.items("search")
    counts = {name: len(task.items) for name, task in tasks.items()}
    race = rival if comparable(rival, counts) else None
    # The same blocks with a rival and without: in half precision a score depends on what shares its batch.
    shares = (*sorted(racing.rungs), 1.0) if racing.enabled else (1.0,)
    logliks: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    values: TaskValues = {}
    for share in shares:
        clock.enter("evaluate", len(next(iter(logliks.values()))) / max(1, next(iter(counts.values()))))
        ends = {name: max(2, round(share * n)) for name, n in counts.items()}
        blocks = {name: tasks[name].encoded[len(logliks[name]) : ends[name]] for name in tasks}
        for name, found in score_blocks(model, blocks).items():
            logliks[name] += found
        values = {
            name: evaluation.item_values(tasks[name].items[: ends[name]], logliks[name], metric) for name in tasks
        }
        if race is not None and share < 1.0:
            gap, error = paired_gap(values, race)
            if gap + racing.z * error < 0:
                score = float(np.mean([race[name].mean() for name in tasks])) + gap
                scores = task_scores(tasks, logliks)
                return Evaluated(tasks=scores, values=values, score=score, stderr=error, stopped=True)
    scores = task_scores(tasks, logliks)
    score, stderr = evaluation.objective(scores, metric)
    return Evaluated(tasks=scores, values=values, score=score, stderr=stderr, stopped=False)


def score_blocks(model: nn.Module, blocks: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """Return the log-likelihoods of the choices of every item, by task; all tasks share their batches."""
    together = [item for block in blocks.values() for item in block]
    flat = iter(scoring.score(model, together).logliks if together else ())
    return {name: [next(flat) for _ in block] for name, block in blocks.items()}


def task_scores(tasks: dict[str, TaskItems], logliks: dict[str, list[np.ndarray]]) -> tuple[TaskScore, ...]:
    """Return the score of every task over the items that were scored."""
    return tuple(evaluation.task_score(tasks[name].items[: len(found)], found) for name, found in logliks.items())


def run_trial(
    data: dict[str, Any] | None, bench: Workbench, observer: Observer = silent, rival: TaskValues | None = None
) -> tuple[TrialResult, TaskValues]:
    """Run one trial and return its result and the value of every item that was scored, by task.

    Args:
        data: the configuration as `TrialConfig.to_dict` gives it, None for the dense model.
        bench: what the worker keeps between trials; not changed.
        observer: called with (phase, progress in it or None).
        rival: item values of the best trial so far, for early stopping.

    Raises:
        TrialError: the trial has no score, with the reason.
    """
    clock = Clock(observer)
    notes: dict[str, float | str] = {}
    if data is None:
        clock.enter("load")
        dense = bench.structure()
        model, widths, parameters = bench.dense(), dense.dense_widths(), dense.parameters
    else:
        config = TrialConfig.from_dict(data, "trial")
        pruned = prune(config, bench, clock)
        model, widths, parameters = pruned.model, pruned.plan.widths(pruned.structure), pruned.plan.parameters
        notes = _loss_notes(recover(pruned, config.recovery, config, bench, clock))
        del pruned
    found = evaluate(model, bench, clock, rival)
    clock.enter("done")
    bench.assert_unchanged()
    del model
    bench.release()
    result = TrialResult(
        score=found.score,
        stderr=found.stderr,
        tasks=found.tasks,
        parameters=parameters,
        widths=widths,
        items=sum(map(len, found.values.values())),
        stopped=found.stopped,
        seconds=clock.seconds,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        notes=notes,
    )
    return result, found.values


def _loss_notes(report: RecoveryReport) -> dict[str, float | str]:
    """Return the loss of the first step and the mean over the last quarter of the steps (nats per token)."""
    if not report.losses:
        return {}
    tail = report.losses[-max(1, len(report.losses) // 4) :]
    return {"loss_first": report.losses[0], "loss_last": sum(tail) / len(tail), "recovery_tokens": float(report.tokens)}
