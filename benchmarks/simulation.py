"""A search under a virtual clock: workers take the seconds that trials say they take, and nobody sleeps.

Trials are told as they finish, or in the order of the driver (`adasearch.search.driver`): by their numbers, and trial n
is asked when exactly those up to n - lag are told. A policy may stop a trial after a rung.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from adasearch.search.noise import Consensus
from adasearch.search.outcomes import lag
from benchmarks.problems import Outcome, Phase, Problem

Order = Literal["in_order", "finished"]
FEW_PAIRS = 5


@dataclass(slots=True, kw_only=True, eq=False)
class Progress:
    """What is known of a trial so far.

    Args:
        number: of the trial, from 0.
        params: where it lies.
        recipe: whether it is a seed trial.
        merits: by rung, in order.
        reached: seconds that were spent when the rung was known, by rung.
        score: of the whole trial, None before its end and where it was stopped.
        stderr: of the score.
        spent: seconds.
    """

    number: int
    params: dict[str, Any]
    recipe: bool
    merits: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    stderr: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A trial ends here, with an estimate of the score that it would have had."""

    value: float
    stderr: float


class Policy(Protocol):
    """Decides after each rung. `extra` names the rungs that are measured for it beyond a plain trial's."""

    extra: frozenset[str]

    def __call__(self, history: Sequence[Progress], progress: Progress, rung: str) -> Stop | None:
        """Return how the trial ends, None if it goes on.

        Args:
            history: what may be known of other trials; where trials are told in order, those that were told when
                this one was asked, so that the answer does not hang on who was quicker.
            progress: of the trial, the merit of `rung` included.
            rung: the one just measured.
        """


class Book(Protocol):
    """Who proposes."""

    def ask(self, number: int, recipe: dict[str, Any] | None) -> dict[str, Any]:
        """Return where trial `number` lies: at `recipe`, if that is given."""

    def tell(self, number: int, value: float, stderr: float, paired: float) -> None:
        """Take the value of a trial, its standard error, and that of its difference to the other trials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A trial that was told.

    Args:
        number: of the trial.
        params: where it lies.
        value: that was told, a score or an estimate.
        stderr: of the value.
        paired: standard error of its difference to the other trials.
        full: whether the value is the score of the whole trial.
        recipe: whether it is a seed trial.
        time: virtual seconds since the start.
        cost: seconds of work, over all workers, until then.
        asking: processor seconds that the proposal took.
    """

    number: int
    params: dict[str, Any]
    value: float
    stderr: float
    paired: float
    full: bool
    recipe: bool
    time: float
    cost: float
    asking: float


@dataclass(slots=True, kw_only=True)
class _Trial:
    progress: Progress
    outcome: Outcome
    phases: tuple[Phase, ...]
    history: list[Progress] | None
    asking: float
    twin: int | None
    at: int = 0
    value: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a search is run.

    Args:
        workers: trials at the same time.
        trials: in all, recipes included.
        seed: of the trials' items.
        order: in which trials are told.
        recipes: whether the problem's seed trials come first.
    """

    workers: int
    trials: int
    seed: int
    order: Order = "in_order"
    recipes: bool = False


class Replay:
    """One search; `run` gives what was told, in that order. Without a policy all trials run to their end."""

    def __init__(self, problem: Problem, book: Book, setting: Setting, policy: Policy | None = None) -> None:
        self._problem, self._book, self._policy = problem, book, policy
        self._workers, self._total, self._seed = setting.workers, setting.trials, setting.seed
        self._order = setting.order
        self._recipes = list(problem.recipes.values())[: setting.trials] if setting.recipes else []
        self._lag = lag(setting.workers)
        self._trials: list[_Trial] = []
        self._by_key: dict[str, int] = {}
        self._queue: list[int] = []
        self._events: list[tuple[float, int]] = []
        self._time = self._cost = 0.0
        self._told: dict[int, Told] = {}
        self._consensus = Consensus()

    def run(self) -> list[Told]:
        """Return the trials as they were told."""
        self._advance()
        while self._events:
            self._time, number = heapq.heappop(self._events)
            self._finish_phase(self._trials[number])
            self._advance()
        return list(self._told.values())

    def _advance(self) -> None:
        """Ask, hand out and tell as far as the order allows."""
        step = self._in_order if self._order == "in_order" else self._as_finished
        while step():
            pass
        while self._queue and len(self._events) < self._workers:
            self._start(self._trials[self._queue.pop(0)])

    def _in_order(self) -> bool:
        """Tell or ask one trial by the driver's rule; return whether there was one."""
        asked, told = len(self._trials), len(self._told)
        if told < asked and (told <= asked - self._lag or asked >= self._total):
            return self._tell(told)
        if asked < self._total and told > asked - self._lag:
            self._ask()
            return True
        return False

    def _as_finished(self) -> bool:
        """Tell a trial that is done, or ask one if a worker is free; return whether there was one."""
        for number in range(len(self._trials)):
            if number not in self._told and self._tell(number):
                return True
        if len(self._trials) < self._total and len(self._events) + len(self._queue) < self._workers:
            self._ask()
            return True
        return False

    def _ask(self) -> None:
        number = len(self._trials)
        recipe = self._recipes[number] if number < len(self._recipes) else None
        begun = time.process_time()
        params = self._book.ask(number, recipe)
        asking = time.process_time() - begun
        first = self._by_key.setdefault(self._problem.point_key(params), number)
        outcome = self._problem.evaluate(params, self._seed)
        extra = self._policy.extra if self._policy else frozenset()
        in_order = self._order == "in_order"
        self._trials.append(
            _Trial(
                progress=Progress(number=number, params=params, recipe=recipe is not None),
                outcome=outcome,
                phases=tuple(phase for phase in outcome.phases if not phase.extra or phase.name in extra),
                history=[self._trials[n].progress for n in self._told] if in_order else None,
                asking=asking,
                twin=first if first != number else None,
            )
        )
        if first == number:
            self._queue.append(number)

    def _start(self, trial: _Trial) -> None:
        heapq.heappush(self._events, (self._time + trial.phases[trial.at].seconds, trial.progress.number))

    def _finish_phase(self, trial: _Trial) -> None:
        phase, progress = trial.phases[trial.at], trial.progress
        self._cost += phase.seconds
        progress.spent += phase.seconds
        trial.at += 1
        if trial.at == len(trial.phases):
            progress.score, progress.stderr = trial.outcome.score, trial.outcome.stderr
            trial.value = progress.score, progress.stderr
            return
        if phase.merit is not None:
            progress.merits[phase.name], progress.reached[phase.name] = phase.merit, progress.spent
            stop = self._stop(trial, phase.name)
            if stop is not None:
                trial.value = stop.value, stop.stderr
                return
        self._start(trial)

    def _stop(self, trial: _Trial, rung: str) -> Stop | None:
        """Return how a trial ends; seed trials go on to their end, so that the winner can be held against them."""
        if self._policy is None or trial.progress.recipe:
            return None
        history = trial.history
        if history is None:
            history = [other.progress for other in self._trials if other is not trial]
        return self._policy(history, trial.progress, rung)

    def _tell(self, number: int) -> bool:
        """Tell a trial if it is done; one that equals an earlier trial takes its result. Return whether it was told."""
        trial = self._trials[number]
        source = trial if trial.twin is None else self._trials[trial.twin]
        if source.value is None:
            return False
        full = source.progress.score is not None
        if trial is not source:
            mine, its = trial.progress, source.progress
            mine.merits, mine.reached, mine.score, mine.spent = its.merits, its.reached, its.score, its.spent
        value, stderr = source.value
        paired = self._paired(source.outcome) if full else stderr
        self._book.tell(number, value, stderr, paired)
        self._told[number] = Told(
            number=number, params=trial.progress.params, value=value, stderr=stderr, paired=paired, full=full,
            recipe=trial.progress.recipe, time=self._time, cost=self._cost, asking=trial.asking,
        )  # fmt: skip
        if full and trial is source:
            self._consensus.add(trial.outcome.by_task)
        return True

    def _paired(self, outcome: Outcome) -> float:
        """Return the standard error against the mean of the trials told so far, nan before there is one."""
        error = self._consensus.error(outcome.by_task)
        return math.nan if error is None else error


class Halving:
    """Asynchronous successive halving, the reference for policies that spend more thought.

    After each rung a trial goes on if it is among the best 1/eta of all that were measured there (Li et al. 2020,
    arXiv 1810.05934, in the variant that stops in place of pausing). What is told of a stopped trial is a straight
    line through the pairs of merit and score of the trials that were not stopped, with the error of a prediction.

    Args:
        rungs: at which trials stop.
        eta: one in so many goes on.
        grace: measured trials below which all go on.
    """

    def __init__(self, rungs: Sequence[str] = ("divergence", "recovered_30"), eta: float = 2.0, grace: int = 8) -> None:
        self.extra = frozenset(rungs)
        self._eta, self._grace = eta, grace

    def __call__(self, history: Sequence[Progress], progress: Progress, rung: str) -> Stop | None:
        """Return the end of a trial that is not among the best, None for one that is, or while too little is known."""
        merits = [other.merits[rung] for other in history if rung in other.merits]
        if rung not in self.extra or len(merits) < self._grace:
            return None
        mine = progress.merits[rung]
        if sum(merit > mine for merit in merits) < (len(merits) + 1) / self._eta:
            return None
        pairs = [(o.merits[rung], o.score) for o in history if rung in o.merits and o.score is not None]
        return predicted(pairs, mine) if len(pairs) >= FEW_PAIRS else None


def predicted(pairs: Sequence[tuple[float, float]], merit: float) -> Stop:
    """Return what a least-squares line through n pairs (merit, score) says of another merit.

    Its error is s sqrt(1 + 1/n + (x - mean)^2 / sum of squares), s with n - 2 degrees of freedom.
    """
    x, y = np.array(pairs).T
    away = x - x.mean()
    squares = float((away**2).sum())
    slope = float((away * y).sum()) / squares if squares > 0 else 0.0
    left = y - y.mean() - slope * away
    s2 = float((left**2).sum()) / max(1, len(x) - 2)
    lever = (merit - float(x.mean())) ** 2 / squares if squares > 0 else 0.0
    value = float(y.mean()) + slope * (merit - float(x.mean()))
    return Stop(value=value, stderr=float(np.sqrt(s2 * (1 + 1 / len(x) + lever))))


def chosen(told: Sequence[Told]) -> int | None:
    """Return the index of the best score of a whole trial, the earliest of equal ones; None where there is none."""
    full = [(trial.value, -index) for index, trial in enumerate(told) if trial.full]
    return -max(full)[1] if full else None
