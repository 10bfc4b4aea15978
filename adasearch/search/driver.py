"""The loop of a search: ask, hand out, collect, tell; over again until all trials are told.

Proposals follow from the seed and the number of workers alone, never from which trial was quicker: trials are told in
the order of their numbers, and trial n is asked when exactly the trials up to n - lag have been told. It is proposed
in a thread while earlier ones run, so a free worker finds it in the queue. What a trial must show at its rungs follows
from the same trials, and from which share of their time was still to come there. A finished trial is on disk before it
counts, so the driver may end at any point and go on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from adasearch.config import StudyConfig, TrialConfig, TrialResult
from adasearch.documents import value
from adasearch.errors import NoTrialError, StorageError
from adasearch.promotion import Gate
from adasearch.racing import in_control
from adasearch.records import DENSE, Record, read_records, trial_folder
from adasearch.search.ahead import Proposer
from adasearch.search.executor import Executor, Outcome
from adasearch.search.gates import gates_of
from adasearch.search.lease import hold
from adasearch.search.outcomes import (
    Asked,
    SearchClock,
    commonest_cause,
    copied_record,
    due,
    lag_of,
    made_ahead,
    next_attempt,
    read_ended,
    records_of,
    settled,
    sound_record,
    too_many_failed,
    write_ended,
    write_proposal,
)
from adasearch.search.seeds import find_seeds
from adasearch.search.snapshot import Observer, Snapshot
from adasearch.search.space import Space
from adasearch.search.stopping import Ended, reason, spent, summary

if TYPE_CHECKING:
    from adasearch.search.study import SearchStudy

_LOG = logging.getLogger(__name__)
_WAIT_SECONDS = 1.0
_POLL_SECONDS = 0.1


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
        gates: what is asked of the trial before it is scored.
    """

    number: int
    attempt: int
    recipe: str | None
    config: dict[str, Any] | None
    folder: str
    incumbent: str | None
    control: bool = False
    gates: tuple[Gate, ...] = ()


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
        observer: called with a snapshot whenever something has happened, and at least about once a second.

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
                with search:
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
        self._lag = lag_of(study)
        self._limit = study.trials
        self._since = -1
        self._proposer = Proposer(book.proposed, ahead=made_ahead(study))
        self._clock = SearchClock(run)
        self._trials: list[_Trial] = []
        self._dense = _Trial(Asked(number=DENSE, params={}, recipe=None, told=True), None)
        self._by_key: dict[str, int] = {}
        self._queue: set[int] = set()
        self._running: dict[str, tuple[int, int]] = {}
        self._told = 0
        self._outcomes: list[Record] = []
        self._events: list[str] = []
        seeds = find_seeds(study, space)
        self._recipes = seeds.recipes
        for line in seeds.lines():
            self._say(line)
        self._say(book.sampler.line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._proposer.close()
        with contextlib.suppress(StorageError):  # what ended the search says more
            self._clock.keep(now=True)

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
        self._take_up_decision()
        if self._trials:
            self._events.append(f"going on: {self._told} of {self._total} trials are told")

    def _take_up_decision(self) -> None:
        """Keep to an earlier decision to end, or lift it where the study has got another rule or more trials since."""
        ended = read_ended(self._run)
        if ended is None:
            return
        if ended.stands(self._study.stopping, self._study.trials):
            self._limit = ended.asked
            self._events.append(summary(ended, self._study.trials))
            return
        self._since = ended.asked
        if not ended.lifted:
            write_ended(self._run, dataclasses.replace(ended, lifted=True))

    def loop(self) -> None:
        """Run until every trial is told and the dense model is scored."""
        while True:
            self._hand_out()
            self._advance()
            self._hand_out()
            self._clock.keep()
            self._report()
            if not self._running and not self._queue and self._next is None:
                break
            for outcome in self._wait():
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
    def _next(self) -> Literal["ask", "tell"] | None:
        return due(len(self._trials), self._told, self._lag, self._limit)

    def _wait(self) -> list[Outcome]:
        """Return what has finished, as soon as something has; also when a proposal is ready that a worker waits for."""
        if self._proposer.busy and not self._running:
            self._proposer.wait(_WAIT_SECONDS)
            return []
        return self._executor.wait(_POLL_SECONDS if self._proposer.busy else _WAIT_SECONDS)

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
        while (step := self._next) is not None:
            if not (self._ask_next() if step == "ask" else self._tell_next()):
                return

    def _ask_next(self) -> bool:
        """Ask for the next trial, or decide that there is none; False where its proposal is still being computed."""
        number = len(self._trials)
        if self._is_over():
            return True
        if number < len(self._recipes):
            recipe = self._recipes[number]
            asked = Asked(number=number, params=recipe.params, recipe=recipe.name, told=False)
        else:
            found = self._proposer.proposal(lambda: self._book.before(number))
            if found is None:
                return False
            if number > self._since and self._is_over(found.gain):
                return True
            asked = Asked(number=number, params=found.params, recipe=None, told=False, gain=found.gain)
        self._book.add(asked)
        if self._added(asked).twin is None:
            self._queue.add(number)
        return True

    def _is_over(self, *following: float | None) -> bool:
        """Decide whether no more trials are asked for; `following` is the expected gain of the next one if known."""
        number, rule = len(self._trials), self._study.stopping
        proposals = [t.asked for t in self._trials[self._since + 1 :] if t.asked.recipe is None]
        finished = [trial.record for trial in self._trials if trial.record]
        gains = [asked.gain for asked in proposals] + [*following]
        why = reason(rule, self._clock.seconds, spent(finished), gains) if number else None
        why = why or self._space.exhausted(t.asked.params for t in self._trials if t.config is not None)
        if why is None:
            return False
        ended = Ended(reason=why, asked=number, trials=self._study.trials, rule=rule)
        write_ended(self._run, ended)
        self._limit = number
        self._proposer.forget()
        self._say(summary(ended, self._study.trials))
        return True

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
            # a recipe is scored in full: what the search promises of the seeds is a matter of equal fidelity
            control = bool(trial.asked.recipe) or in_control(self._study.racing.control, self._study.seed, number)
            task = Assignment(
                number=number,
                attempt=attempt,
                recipe=trial.asked.recipe,
                config=config,
                folder=str(folder),
                incumbent=self._incumbent(number),
                control=control,
                gates=gates_of(self._study, number, self._known(number - self._lag + 1), control=control),
            )
            self._executor.submit(folder.name, task, seconds=self._study.limits.trial_seconds)
            self._queue.remove(number)
            self._running[folder.name] = number, attempt

    def _incumbent(self, number: int) -> str | None:
        """Return the folder of the best trial that was told when this one was asked, whatever was told since."""
        if not self._study.races or number == DENSE or number < self._study.racing.grace:
            return None
        best = self._best(number - self._lag + 1)
        return str(trial_folder(self._run, best.number, best.attempt)) if best else None

    def _best(self, end: int | None = None) -> Record | None:
        """Return the best trial with all items scored among those told, or among those numbered below `end`.

        A trial beyond a hard limit is no winner; costs have no other say, see `tradeoff` for the front.
        """
        end = self._told if end is None else end
        scored = [(r.result.score, -r.number, r) for r in self._known(end) if r.result and not r.result.stopped
                  and self._study.objective.admits(r.result.shares)]  # fmt: skip
        return max(scored, key=lambda item: item[:2])[2] if scored else None

    def _known(self, end: int) -> list[Record]:
        """Return what came of the trials numbered below `end`, by number."""
        return [trial.record for trial in self._trials[: max(end, 0)] if trial.record]

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
        elapsed = self._clock.here
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
