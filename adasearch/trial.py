"""One trial: configuration -> smaller model -> score. The pipeline on one screen.

outline -> calibrate -> score -> allocate -> select -> cut + compensate -> measure -> recover, measure -> evaluate
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from adasearch import costs, environment, goals, models, outlining, racing, registry, trainings
from adasearch.conduct import Conduct, conducted
from adasearch.config import Component, TaskScore, TrialConfig, TrialResult, mean_of
from adasearch.errors import ConfigError, TrialError
from adasearch.promotion import Gate
from adasearch.pruning import allocation, schedule, statistics
from adasearch.pruning.plan import PruningPlan
from adasearch.pruning.schedule import ScheduleContext
from adasearch.pruning.structure import WHOLE, Outline
from adasearch.racing import Early, Race, Rung, TaskValues
from adasearch.records import last_quarter
from adasearch.tuning import divergence, evaluation, scoring
from adasearch.tuning.adapter_files import Kept
from adasearch.tuning.recovery import Progress, RecoveryReport

if TYPE_CHECKING:
    from torch import Tensor, nn

    from adasearch.models import BaseModel
    from adasearch.pruning.statistics import Statistics
    from adasearch.pruning.structure import ModelStructure
    from adasearch.tuning.decoder import Updates
    from adasearch.workbench import TaskItems, Workbench

Observer = Callable[[str, float | None, Progress | None], None]
Blocks = dict[str, tuple[scoring.EncodedItem, ...]]


def silent(_phase: str, _progress: float | None, _training: Progress | None) -> None:
    """Observe nothing."""


class Clock:
    """Seconds spent in each phase, and the peak of memory; tells an observer when a phase begins and how far it is."""

    def __init__(self, observer: Observer = silent) -> None:
        environment.forget_peak_memory()
        models.forget_gpu_peak()
        self.seconds: dict[str, float] = {}
        self.phase = ""
        self._observer = observer
        self._begun = self._since = time.perf_counter()

    def enter(self, phase: str, progress: float | None = None, training: Progress | None = None) -> None:
        """End the current phase and begin `phase`; the same phase again only reports progress, of a training too."""
        if phase != self.phase:
            now = time.perf_counter()
            if self.phase:
                self.seconds[self.phase] = round(self.seconds.get(self.phase, 0.0) + now - self._since, 3)
            self.phase, self._since = phase, now
        self._observer(phase, progress, training)

    @property
    def spent(self) -> float:
        """Return the seconds since this clock was made."""
        return time.perf_counter() - self._begun

    @property
    def peak_bytes(self) -> int:
        """Return the greatest resident memory of this process since this clock was made, mapped weights included."""
        return environment.peak_memory()

    @property
    def gpu_bytes(self) -> int:
        """Return the greatest memory of this process's tensors on its GPU since then, 0 without one."""
        return models.gpu_peak()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pruned:
    """A model after the cut, the decision that led to it, and the model that its widths were cut from."""

    model: nn.Module
    structure: ModelStructure
    plan: PruningPlan
    base: BaseModel
    beside: dict[str, Kept] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Evaluated:
    """What scoring gave: scores by task, the value of each item, and the estimate of the objective.

    Args:
        stopped: the trial ended before all items were scored.
        rungs: the objective after each block of items.
    """

    tasks: tuple[TaskScore, ...]
    values: TaskValues
    score: float
    stderr: float
    stopped: bool
    rungs: tuple[Rung, ...]


def context_of(
    config: TrialConfig,
    bench: Workbench,
    structure: ModelStructure,
    statistics: Statistics | None,
    clock: Clock | None = None,
) -> ScheduleContext:
    """Return what the schedule of a trial decides from, given statistics of the model before its widths are cut."""
    base = bench.outlined(structure.outline)
    return ScheduleContext(
        config=base.config,
        weights=base.weights,
        structure=structure,
        statistics=statistics,
        tokens=lambda: bench.sample_tokens(config.calibration, structure.outline),
        trial=config,
        budget=allocation.aimed(bench.study.budget_of(config), config.allocation),
        device=bench.device,
        train=trainings.of_schedule(config, bench, structure, clock or Clock()),
    )


@contextlib.contextmanager
def refusals(phase: str) -> Iterator[None]:
    """Make what a configuration asks for and cannot have the failure of its trial: no reason to end a search."""
    try:
        yield
    except ConfigError as error:
        raise TrialError("config", str(error), phase) from error


def prune(config: TrialConfig, bench: Workbench, clock: Clock) -> Pruned:
    """Return the model cut to the budget and compensated, not yet recovered."""
    if outlining.wanted(config):
        clock.enter("outline")
    learnt: dict[str, Tensor] = {}
    outline = outlining.decide(config, bench, trainings.of_hidden(config, bench, clock, learnt))
    bench = bench.rebased(learnt)
    base, structure = bench.outlined(outline), bench.structure(config.units, outline)
    clock.enter("calibrate")
    with refusals("calibrate"):
        schedule.check(config)
    statistics = bench.statistics(structure, config.calibration, config.units, schedule.needs(config))
    clock.enter("plan")
    with refusals("plan"):
        context = goals.met(context_of(config, bench, structure, statistics, clock), goals.of_bench(config, bench))
        decision = schedule.decide(context)
    clock.enter("cut")
    model = schedule.cut(context, decision, models.own_weights(base))
    return Pruned(model=model, structure=structure, plan=decision.plan, base=base)


def recover(
    pruned: Pruned,
    recovery: Component,
    config: TrialConfig,
    bench: Workbench,
    clock: Clock,
    conduct: Conduct = Conduct(),  # noqa: B008 - frozen
) -> RecoveryReport:
    """Tune the smaller model in place and return what was done."""
    asked = dataclasses.replace(config, recovery=recovery)
    text, context = trainings.given("recovery", asked, bench, pruned.structure.outline, clock, conduct.rules.validation)
    if pruned.beside is not None:
        context = dataclasses.replace(context, keep=functools.partial(_keep, pruned.model, pruned.beside))
    train = registry.RECOVERY.get(recovery.type).function
    with conducted(conduct, context, recovery, text, pruned.plan, bench.model_key) as context:
        report: RecoveryReport = train(pruned.model, pruned.structure, text.tokens, recovery.options, context)
    return dataclasses.replace(report, dropped=text.dropped, epochs=report.epochs * text.epochs)


def _keep(model: nn.Module, found: dict[str, Kept], updates: Updates) -> None:
    """Put what is about to be merged into `found`, by the path of its module."""
    names = {module: name for name, module in model.named_modules()}
    for module, update in updates.items():
        kept = Kept.of(module, update)
        if kept is not None:
            found[names[module]] = kept


class Stopped(Exception):  # noqa: N818 - a decision, no error; it must pass through the training loop
    """The trial ends at a rung, with the score that is to be expected of it."""

    def __init__(self, found: Evaluated) -> None:
        super().__init__(found.score)
        self.found = found


class Ascent:
    """The way of one trial from the cut to its score: measures its rungs, and stops it at the first gate it fails.

    Args:
        pruned: the model after the cut.
        bench: holds what it is measured on.
        clock: told what is going on.
        gates: what is asked of the trial, see `promotion`.
    """

    def __init__(self, pruned: Pruned, bench: Workbench, clock: Clock, gates: Sequence[Gate] = ()) -> None:
        self.rungs: tuple[Rung, ...] = ()
        self._pruned, self._bench, self._clock = pruned, bench, clock
        self._gates = {gate.kind: gate for gate in gates}
        # models of different vocabularies have no common distribution to diverge from
        self._diverges = bench.study.fidelity.divergence > 0 and pruned.structure.outline.tokens is None

    def measure(self) -> None:
        """Measure what the study wants to know of a model right after its cut; the model stays as it is.

        Raises:
            Stopped: at a gate.
        """
        if self._diverges:
            self._diverge("divergence")
        share = self._bench.study.fidelity.unrecovered
        if share:
            self._clock.enter("unrecovered")
            tasks = self._bench.items("search", self._pruned.structure.outline)
            begun = time.perf_counter()
            logliks = score_blocks(self._pruned.model, first_items(tasks, share))
            found = mean_of(task_scores(tasks, logliks), self._bench.study.objective.metric)
            self._pass("unrecovered", share, found, begun)

    def look(self, step: int, steps: int, updates: Updates) -> None:
        """Measure the divergence once in the course of the recovery; a `RecoveryContext.look`.

        Raises:
            Stopped: at its gate.
        """
        share = self._bench.study.fidelity.midway
        if self._diverges and 0 < share < 1 and step == max(1, round(share * steps)):
            self._diverge("midway", updates)
            self._clock.enter("recover", step / steps)

    def _diverge(self, kind: Early, updates: Updates | None = None) -> None:
        self._clock.enter(kind)
        reference = self._bench.reference()  # made by a worker's first trial, whose cost it is not
        begun = time.perf_counter()
        self._pass(kind, 0.0, divergence.divergence(self._pruned.model, reference, updates), begun)

    def _pass(self, kind: Early, share: float, found: tuple[float, float], begun: float) -> None:
        """Enter a rung, and end the trial there if its merit is below what its gate asks."""
        gate = self._gates.get(kind)
        rung = Rung(
            kind=kind,
            share=share,
            value=found[0],
            stderr=found[1],
            seconds=time.perf_counter() - begun,
            spent=self._clock.spent,
            least=gate.least if gate else None,
        )
        self.rungs += (rung,)
        if gate is not None and gate.stops and rung.behind:
            score, stderr = gate.predict(rung.merit)
            raise Stopped(Evaluated(tasks=(), values={}, score=score, stderr=stderr, stopped=True, rungs=()))


def weigh(model: nn.Module, pruned: Pruned | None, bench: Workbench, clock: Clock) -> costs.Costs:
    """Return what a model costs, as far as the study asks for it; `pruned` is None for the dense model."""
    if bench.study.objective.costs:
        clock.enter("costs")
    if pruned is None:
        return costs.measured(bench, model, bench.structure(), None)
    return costs.measured(bench, model, pruned.structure, pruned.plan)


def first_items(tasks: dict[str, TaskItems], share: float, after: dict[str, int] | None = None) -> Blocks:
    """Return the first `share` of each task's items, at least two, but for the first `after` of them."""
    ends = {name: max(2, round(share * len(task.items))) for name, task in tasks.items()}
    return {name: task.encoded[(after or {}).get(name, 0) : ends[name]] for name, task in tasks.items()}


def evaluate(
    model: nn.Module, bench: Workbench, clock: Clock, race: Race | None = None, outline: Outline = WHOLE
) -> Evaluated:
    """Score a model on the search items, block by block; stop where it is behind its rival with confidence.

    It is looked at after each of `racing.rungs`, see `racing.upper_bound`. The score of a model that stops is estimated
    from the rival's and the paired gap, see `racing.estimate`: all trials are compared on the same footing.

    Args:
        model: any causal language model.
        bench: holds the items.
        clock: told of the progress.
        race: against whom; None, or a rival that was not scored on all items, is no race.
        outline: of the model, whose tokenizer writes the items.
    """
    metric, rules = bench.study.objective.metric, bench.study.racing
    tasks = bench.items("search", outline)
    counts = {name: len(task.items) for name, task in tasks.items()}
    race = race if race is not None and racing.comparable(race.rival, counts) else None
    # The same blocks with a rival and without: in half precision a score depends on what shares its batch.
    shares = (*sorted(rules.rungs), 1.0) if rules.enabled else (1.0,)
    logliks: dict[str, list[np.ndarray]] = {name: [] for name in tasks}
    rungs: list[Rung] = []
    for share in shares:
        clock.enter("evaluate", rungs[-1].share if rungs else 0.0)
        begun = time.perf_counter()
        done = {name: len(found) for name, found in logliks.items()}
        for name, found in score_blocks(model, first_items(tasks, share, done)).items():
            logliks[name] += found
        values = {
            name: evaluation.item_values(tasks[name].items[: len(found)], found, metric)
            for name, found in logliks.items()
        }
        scores = task_scores(tasks, logliks)
        score, stderr = mean_of(scores, metric)
        gap, bound = racing.upper_bound(values, race.rival, rules.z, len(rules.rungs)) if race else (None, None)
        seconds = time.perf_counter() - begun
        rungs.append(Rung(kind="recovered", share=share, value=score, stderr=stderr, seconds=seconds,
                          spent=clock.spent, gap=gap, bound=bound))  # fmt: skip
        stopped = race is not None and race.stops and rungs[-1].behind and share < 1.0
        if stopped:
            break
    if race is not None and stopped:
        score, stderr = racing.estimate(values, race.rival)
    return Evaluated(tasks=scores, values=values, score=score, stderr=stderr, stopped=stopped, rungs=tuple(rungs))


def score_blocks(model: nn.Module, blocks: Blocks) -> dict[str, list[np.ndarray]]:
    """Return the log-likelihoods of the choices of every item, by task; all tasks share their batches."""
    together = [item for block in blocks.values() for item in block]
    flat = iter(scoring.score(model, together).logliks if together else ())
    return {name: [next(flat) for _ in block] for name, block in blocks.items()}


def task_scores(tasks: dict[str, TaskItems], logliks: dict[str, list[np.ndarray]]) -> tuple[TaskScore, ...]:
    """Return the score of every task over the items that were scored."""
    return tuple(evaluation.task_score(tasks[name].items[: len(found)], found) for name, found in logliks.items())


def run_trial(
    data: dict[str, Any] | None,
    bench: Workbench,
    observer: Observer = silent,
    race: Race | None = None,
    gates: Sequence[Gate] = (),
) -> tuple[TrialResult, TaskValues]:
    """Run one trial and return its result and the value of every item that was scored, by task.

    Args:
        data: the configuration as `TrialConfig.to_dict` gives it, None for the dense model.
        bench: what the worker keeps between trials; not changed.
        observer: called with (phase, progress in it or None).
        race: item values of the best trial so far, for early stopping.
        gates: what is asked of the trial before its score; one that fails has no items and a predicted score.

    Raises:
        TrialError: the trial has no score, with the reason.
    """
    clock = Clock(observer)
    notes: dict[str, float | str] = {}
    rungs: tuple[Rung, ...] = ()
    if data is None:
        clock.enter("load")
        dense = bench.structure()
        widths, parameters = dense.dense_widths(), dense.parameters
        cost = weigh(bench.dense(), None, bench, clock)
        found = evaluate(bench.dense(), bench, clock, race)
    else:
        config = TrialConfig.from_dict(data, "trial")
        pruned = prune(config, bench, clock)
        widths, parameters = pruned.plan.dense_widths(pruned.structure), pruned.plan.parameters
        cost = weigh(pruned.model, pruned, bench, clock)  # recovery changes none of it, and every trial has it
        ascent = Ascent(pruned, bench, clock, gates)
        notes = _sample_notes(config, bench, pruned.structure.outline)
        notes |= goals.notes(goals.of_bench(config, bench), pruned.structure, pruned.plan)
        try:
            ascent.measure()
            notes |= _loss_notes(recover(pruned, config.recovery, config, bench, clock, Conduct(look=ascent.look)))
            found = evaluate(pruned.model, bench, clock, race, pruned.structure.outline)
        except Stopped as stopped:
            found = stopped.found
        rungs = ascent.rungs
        del pruned, ascent
    clock.enter("done")
    bench.assert_unchanged()
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
        peak_bytes=clock.peak_bytes,
        notes=notes,
        rungs=rungs + found.rungs,
        costs=cost.figures,
        shares=cost.shares,
        spreads=cost.spreads,
    )
    return result, found.values


def _sample_notes(config: TrialConfig, bench: Workbench, outline: Outline) -> dict[str, float | str]:
    """Return how many documents the calibration passed over because report items stand in them, if any."""
    needs = statistics.by_corpus(schedule.needs(config))
    read = [corpus or config.calibration.corpus for corpus, families in needs.items() if families]
    samples = [dataclasses.replace(config.calibration, corpus=corpus) for corpus in read]
    dropped = sum(bench.sample_dropped(sample, outline) for sample in samples)
    return {"calibration_dropped": float(dropped)} if dropped else {}


def _loss_notes(report: RecoveryReport) -> dict[str, float | str]:
    """Return the loss of the first step and the mean over the last quarter of the steps (nats per token).

    And how many documents were left out of the text because report items stand in them, and how often it was gone
    through, where it was repeated.
    """
    if not report.losses:
        return {}
    dropped = {"recovery_dropped": float(report.dropped)} if report.dropped else {}
    repeated = {"recovery_epochs": report.epochs} if report.epochs > 1 else {}
    return {
        "loss_first": report.losses[0],
        "loss_last": last_quarter(report.losses),
        "recovery_tokens": float(report.tokens),
        **dropped,
        **repeated,
    }
