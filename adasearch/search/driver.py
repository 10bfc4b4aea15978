"""The loop of a search: ask, hand out, collect, tell; over again until all trials are told.

Proposals follow from the seed and the number of workers alone, never from which trial was quicker: trials are told in
the order of their numbers, and trial n is asked when exactly the trials up to n - lag have been told. A finished trial
is on disk before it counts, so the driver may end at any point and go on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.config import StudyConfig, TrialConfig, TrialResult
from adasearch.documents import value
from adasearch.errors import NoTrialError
from adasearch.racing import in_control
from adasearch.records import DENSE, Record, read_records, trial_folder
from adasearch.search.executor import Executor, Outcome
from adasearch.search.lease import hold
from adasearch.search.outcomes import (
    Asked,
    commonest_cause,
    copied_record,
    lag,
    next_attempt,
    num_workers,
    records_of,
    settled,
    sound_record,
    too_many_failed,
    write_proposal,
)
from adasearch.search.seeds import find_seeds
from adasearch.search.space import Space

if TYPE_CHECKING:
    from adasearch.search.study import SearchStudy

_LOG = logging.getLogger(__name__)
_WAIT_SECONDS = 1.0


@value
class Assignment:
    """What a worker is told to do: one attempt at one trial.

    Args:
        number: of the trial, `DENSE` for the dense model.
        attempt: from 1.
        recipe: name of the recipe that the trial is, if any.
        config: ``TrialConfig.to_dict()``, None for the dense model.
        folder: absolute folder of this attempt; the worker writes its record there before it returns.
        incumbent: folder of the trial to race against, None where there is no race.
        control: score every item, whatever the race says.
    """

    number: int
    attempt: int
    recipe: str | None
    config: dict[str, Any] | None
    folder: str
    incumbent: str | None
    control: bool = False


@value
class Snapshot:
    """Where a search stands, for a display.

    Args:
        total: trials of the study.
        done: trials that are finished, failed ones too; without the dense model.
        running: number, phase, and share of the phase done if known, of each trial in a worker.
        stopped: finished trials that stopped early.
        failed: finished trials that have no score.
        best: score of the best trial told, its standard error and number.
        dense: score of the dense model and its standard error.
        seconds_elapsed: since this driver started.
        seconds_left: estimate, None before the first trial is done.
        last: what has just happened, None if nothing has.
    """

    total: int
    done: int
    running: tuple[tuple[int, str, float | None], ...]
    stopped: int
    failed: int
    best: float | None
    best_stderr: float | None
    best_trial: int | None
    dense: float | None
    dense_stderr: float | None
    seconds_elapsed: float
    seconds_left: float | None
    last: str | None


Observer = Callable[[Snapshot], None]


@dataclasses.dataclass(slots=True)
class _Trial:
    """A trial that was asked. `record` is what came of it in the end; `twin` an earlier trial that it equals."""

    asked: Asked
    config: TrialConfig | None
    record: Record | None = None
    twin: int | None = None


@contextlib.contextmanager
def _ending_on_terminate() -> Iterator[None]:
    """Make SIGTERM end the search as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_search(study: StudyConfig, space: Space, run: Path, executor: Executor, observer: Observer) -> list[Record]:
    """Run a search, or what is left of it, to its end and return what came of each trial, the dense model first.

    Args:
        study: the study.
        space: its space, made with the study's seed.
        run: the run folder, made if it is not there.
        executor: where trials run; closed if the search ends early, left open if it is complete.
        observer: called with a snapshot whenever something has happened, and about once a second.

    Raises:
        StorageError: the folder is held by another driver, is of another study, is damaged, or the disk is full.
        NoTrialError: no trial succeeded, or too many of the last ones failed.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; the same call goes on from there.
    """
    # here, because workers import this module for `Assignment` and have no use for the optimizer
    from adasearch.search.study import open_study

    run = run.resolve()
    with _ending_on_terminate():
        try:
            with hold(run), contextlib.closing(open_study(run, study, space)) as book:
                search = _Search(study, space, run, executor, observer, book)
                search.resume()
                search.loop()
        except BaseException:
            executor.close()
            raise
    return search.records()


class _Search:
    """State of one call of `run_search`; all that lasts is on disk."""

    def __init__(
        self, study: StudyConfig, space: Space, run: Path, executor: Executor, observer: Observer, book: SearchStudy
    ) -> None:  # fmt: skip
        self._study, self._space, self._run = study, space, run
        self._executor, self._observer, self._book = executor, observer, book
        self._lag = lag(num_workers(study))
        self._limit = study.trials
        self._trials: list[_Trial] = []
        self._dense = _Trial(Asked(number=DENSE, params={}, recipe=None, told=True), None)
        self._by_key: dict[str, int] = {}
        self._queue: set[int] = set()
        self._running: dict[str, tuple[int, int]] = {}
        self._told = 0
        self._outcomes: list[Record] = []
        self._events: list[str] = []
        self._begun = time.monotonic()
        seeds = find_seeds(study, space)
        self._recipes = seeds.recipes
        for line in seeds.lines():
            self._say(line)
        self._say(book.sampler.line)

    def resume(self) -> None:
        """Take up what an earlier driver left: recorded trials wait to be told, the others are run again."""
        by_number: dict[int, list[Record]] = {}
        for record in read_records(self._run):
            by_number.setdefault(record.number, []).append(record)
        self._dense.record = settled(by_number.get(DENSE, []), self._study.limits.attempts)
        if self._dense.record is None:
            self._queue.add(DENSE)
        for asked in self._book.trials():
            trial = self._added(asked)
            trial.record = settled(by_number.get(asked.number, []), self._study.limits.attempts)
        self._told = next((i for i, trial in enumerate(self._trials) if not trial.asked.told), len(self._trials))
        for trial in self._trials[self._told :]:
            if trial.record is None and trial.twin is None and not trial.asked.told:
                self._queue.add(trial.asked.number)
        if self._trials:
            self._events.append(f"going on: {self._told} of {self._total} trials are told")

    def loop(self) -> None:
        """Run until every trial is told and the dense model is scored."""
        while True:
            self._advance()
            self._hand_out()
            self._report()
            if not self._running and not self._queue and self._told >= self._total:
                break
            for outcome in self._executor.wait(_WAIT_SECONDS):
                self._collect(outcome)
        self._book.note(self._dense_result, self._best())
        if not any(trial.record and trial.record.result for trial in self._trials):
            raise NoTrialError(f"none of {self._total} trials succeeded; {commonest_cause(self.records())}")

    def records(self) -> list[Record]:
        """Return what came of each trial, the dense model first."""
        found = (trial.record for trial in [self._dense, *self._trials])
        return [record for record in found if record is not None]

    @property
    def _total(self) -> int:
        return max(self._limit, len(self._trials))

    @property
    def _dense_result(self) -> TrialResult | None:
        return self._dense.record.result if self._dense.record else None

    def _added(self, asked: Asked) -> _Trial:
        """Return the trial that was asked, entered in the books, and paired with the earlier one that it equals."""
        config = self._space.decode(asked.params) if asked.params.keys() >= self._space.parameters.keys() else None
        trial = _Trial(asked, config)
        if config is not None:
            first = self._by_key.setdefault(config.key, asked.number)
            trial.twin = first if first != asked.number else None
        self._trials.append(trial)
        return trial

    def _advance(self) -> None:
        """Tell and ask as far as the order allows; see the head of this module."""
        moved = True
        while moved:
            asked = len(self._trials)
            moved = False
            if self._told < asked and (self._told <= asked - self._lag or asked >= self._limit):
                moved = self._tell_next()
            elif asked < self._limit and self._is_over():
                moved = True
            elif asked < self._limit and self._told > asked - self._lag:
                recipe = self._recipes[asked] if asked < len(self._recipes) else None
                trial = self._added(self._book.ask(asked, recipe))
                if trial.twin is None:
                    self._queue.add(asked)
                moved = True

    def _is_over(self) -> bool:
        """Decide whether no more trials are asked for, because there is none that would be new."""
        why = self._space.exhausted(t.asked.params for t in self._trials if t.config is not None)
        if why is not None:
            self._say(f"the search ends after {len(self._trials)} of {self._limit} trials: {why}")
            self._limit = len(self._trials)
        return why is not None

    def _tell_next(self) -> bool:
        trial = self._trials[self._told]
        if trial.asked.told:
            self._told += 1
            return True
        if trial.record is None and trial.twin is not None:
            self._settle_as_twin(trial)
        if trial.record is None:
            return False
        self._book.tell(trial.record, self._dense_result)
        self._outcomes.append(trial.record)
        self._told += 1
        if self._best() is trial.record:
            self._book.note(self._dense_result, trial.record)
        self._stop_if_hopeless()
        return True

    def _settle_as_twin(self, trial: _Trial) -> None:
        """Give a trial the result of the earlier one that has the same configuration, or run it if that one failed."""
        assert trial.twin is not None
        assert trial.config is not None
        first = self._trials[trial.twin].record
        number = trial.asked.number
        trial.twin = None
        if first is None or first.result is None:
            self._queue.add(number)
            return
        trial.record = copied_record(self._run, trial.asked, trial.config, first)
        self._say(f"trial {number} is the same as trial {first.number} and takes its result")

    def _hand_out(self) -> None:
        while self._queue and len(self._running) < self._executor.capacity:
            number = min(self._queue)
            trial = self._dense if number == DENSE else self._trials[number]
            attempt = next_attempt(self._run, number)
            config = trial.config.to_dict() if trial.config else None
            if config is not None:
                write_proposal(self._run, trial.asked, attempt, config)
            folder = trial_folder(self._run, number, attempt)
            task = Assignment(
                number=number,
                attempt=attempt,
                recipe=trial.asked.recipe,
                config=config,
                folder=str(folder),
                incumbent=self._incumbent(number),
                # a recipe is scored in full: what the search promises of the seeds is a matter of equal fidelity
                control=bool(trial.asked.recipe) or in_control(self._study.racing.control, self._study.seed, number),
            )
            self._executor.submit(folder.name, task, seconds=self._study.limits.trial_seconds)
            self._queue.remove(number)
            self._running[folder.name] = number, attempt

    def _incumbent(self, number: int) -> str | None:
        """Return the folder of the best trial that was told when this one was asked, whatever was told since."""
        if not self._study.racing.enabled or number == DENSE or number < self._study.racing.grace:
            return None
        best = self._best(number - self._lag + 1)
        return str(trial_folder(self._run, best.number, best.attempt)) if best else None

    def _best(self, end: int | None = None) -> Record | None:
        """Return the best trial with all items scored among those told, or among those numbered below `end`."""
        end = self._told if end is None else end
        records = [trial.record for trial in self._trials[: max(end, 0)] if trial.record]
        scored = [(r.result.score, -r.number, r) for r in records if r.result and not r.result.stopped]
        return max(scored, key=lambda item: item[:2])[2] if scored else None

    def _collect(self, outcome: Outcome) -> None:
        """Take what a worker answered; where it gave no sound record, write one that says why."""
        if outcome.key not in self._running:
            return
        number, attempt = self._running.pop(outcome.key)
        trial = self._dense if number == DENSE else self._trials[number]
        record = sound_record(self._run, trial.asked, attempt, trial.config, outcome)
        name = "dense model" if number == DENSE else f"trial {number}"
        if record.failure is None:
            assert record.result is not None
            early = ", stopped early" if record.result.stopped else ""
            self._say(f"{name}: {record.result.score:.4f} ± {record.result.stderr:.4f}{early}")
            trial.record = record
            return
        trial.record = settled(records_of(self._run, number), self._study.limits.attempts)
        again = ", it is run again" if trial.record is None else ""
        self._say(f"{name} failed: {record.failure.kind}: {record.failure.message}{again}")
        if trial.record is None:
            self._queue.add(number)

    def _stop_if_hopeless(self) -> None:
        problem = too_many_failed(self._outcomes, self._study.limits.failed_share)
        if problem:
            raise NoTrialError(f"{problem} (limits.failed_share); the same command goes on where it was")

    def _say(self, event: str) -> None:
        _LOG.info("%s", event)
        self._events.append(event)

    def _report(self) -> None:
        """Call the observer once for each event, or once where nothing has happened."""
        events, self._events = self._events or [None], []  # type: ignore[list-item]
        for event in events:
            self._observer(self._snapshot(event))

    def _snapshot(self, last: str | None) -> Snapshot:
        records = [trial.record for trial in self._trials if trial.record]
        best, dense = self._best(), self._dense_result
        elapsed = time.monotonic() - self._begun
        done, here = len(records), len(self._outcomes)
        return Snapshot(
            total=self._total,
            done=done,
            running=tuple(self._phase(key, number) for key, (number, _) in self._running.items()),
            stopped=sum(bool(record.result and record.result.stopped) for record in records),
            failed=sum(record.failure is not None for record in records),
            best=best.result.score if best and best.result else None,
            best_stderr=best.result.stderr if best and best.result else None,
            best_trial=best.number if best else None,
            dense=dense.score if dense else None,
            dense_stderr=dense.stderr if dense else None,
            seconds_elapsed=elapsed,
            seconds_left=elapsed / here * (self._total - done) if here else None,
            last=last,
        )

    def _phase(self, key: str, number: int) -> tuple[int, str, float | None]:
        try:
            state = json.loads((self._run / "trials" / key / "state.json").read_text(encoding="utf-8"))
            return number, str(state["phase"]), state["progress"]
        except (OSError, ValueError, KeyError, TypeError):
            return number, "starting", None
