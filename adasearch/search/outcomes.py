"""Trials between asking and telling: in which order, what came of them in the end, and what lies in their folders."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from adasearch.config import TWIN, StudyConfig, TrialConfig
from adasearch.documents import parse, value
from adasearch.errors import ConfigError
from adasearch.records import (
    Failure,
    Record,
    read_items,
    read_record,
    trial_folder,
    write_atomically,
    write_items,
    write_json,
    write_record,
)
from adasearch.search.executor import Outcome
from adasearch.search.stopping import Ended, summary

WINDOW, LEAST_WINDOW = 10, 5
CLOCK_SECONDS = 10.0
RETRIED = frozenset({"memory", "timeout", "worker_lost"})


@value
class Asked:
    """A trial of the study: where it lies in the space, which recipe it is if any, and whether it has been told.

    `gain` is what was expected of it when it was asked, None where that was not looked at.
    """

    number: int
    params: dict[str, Any]
    recipe: str | None
    told: bool
    gain: float | None = None


@value
class Proposed:
    """A point to try next, and what is to be expected of it; see `adasearch.search.belief.expected_gain`."""

    params: dict[str, Any]
    gain: float | None = None


@value
class Recipe:
    """A published recipe as a point of the space."""

    name: str
    params: dict[str, Any]


def num_workers(config: StudyConfig) -> int:
    """Return how many trials the study runs at the same time."""
    workers = 1 if config.cluster.address == "in_process" else config.cluster.workers
    assert workers != "auto", "the number of workers is decided before the search"
    return workers


def made_ahead(config: StudyConfig) -> bool:
    """Return whether the next trial is proposed while others run: not where trials run in the driver's own process."""
    return config.cluster.address != "in_process"


def lag(workers: int, *, ahead: bool = True) -> int:
    """Return how far telling stays behind asking: trial n is asked when exactly those up to n - lag are told.

    A lag of as many as there are workers leaves each of them waiting for its next trial while that is proposed, and for
    the slowest of the others, because trials are told in order. Every trial more is one that may wait in the queue, or
    wait to be told behind a slow one, and one of which the next proposal knows nothing. So:

    - trials in this process are proposed between them, which costs nothing there: 1, all that is known;
    - one worker: 2, the next trial is proposed while this one runs (at 1 it would idle a twentieth of its time where
      asking takes a twentieth of a trial, and every proposal would know one trial more);
    - W workers: W + max(2, 3 W / 4), rounded up. With trials that differ by a factor of 5 in length and asking that
      takes a twentieth of one, workers idle 2 % of the time at W = 4 and 9 % at W = 16; at W + 1 it would be 13 % and
      35 %, at 2 W at most 3 % (``tests/search/test_ahead.py`` has the clock).
    """
    if not ahead:
        return 1
    return 2 if workers == 1 else workers + max(2, -(-3 * workers // 4))


def lag_of(config: StudyConfig) -> int:
    """Return the lag of a study; see `lag`."""
    return lag(num_workers(config), ahead=made_ahead(config))


def due(asked: int, told: int, behind: int, limit: int) -> Literal["ask", "tell"] | None:
    """Return what the order asks for next, None where it is the end. What is due is waited for; nothing overtakes it.

    Args:
        asked: trials that there are.
        told: of them, the first so many.
        behind: the lag.
        limit: trials that there shall be.
    """
    if asked < limit:
        return "ask" if told > asked - behind else "tell"
    return "tell" if told < asked else None


class SearchClock:
    """Counts the seconds of a search over all of its drivers, in ``clock.json`` of the run folder.

    A driver that is killed loses at most what it counted since it last called `keep`, or `CLOCK_SECONDS`.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / "clock.json"
        try:
            earlier = float(json.loads(self._path.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            earlier = 0.0
        self._earlier = earlier if math.isfinite(earlier) and earlier > 0 else 0.0
        self._begun = self._kept = time.monotonic()

    @property
    def here(self) -> float:
        """Return the seconds since this driver started."""
        return time.monotonic() - self._begun

    @property
    def seconds(self) -> float:
        """Return the seconds of all drivers."""
        return self._earlier + self.here

    def keep(self, *, now: bool = False) -> None:
        """Write them down, `now` or if they have not been for `CLOCK_SECONDS`.

        Raises:
            StorageError: the disk is full or not writable.
        """
        if now or time.monotonic() - self._kept >= CLOCK_SECONDS:
            self._kept = time.monotonic()
            write_json(self._path, {"seconds": round(self.seconds, 3)})


def read_ended(run: Path) -> Ended | None:
    """Return the decision to end a search that lies in its folder, None where there is none or it is damaged."""
    path = run / "stopped.json"
    try:
        ended: Ended = parse(Ended, json.loads(path.read_text(encoding="utf-8")), f"{path}:")
    except (OSError, ValueError, ConfigError):
        return None
    return ended


def write_ended(run: Path, ended: Ended) -> None:
    """Write a decision to end a search into its folder."""
    write_json(run / "stopped.json", ended)


def ending(run: Path, config: StudyConfig, done: int) -> str:
    """Return how the search of a run ended, in one sentence; empty while it goes on.

    Args:
        run: run folder.
        config: its study.
        done: trials that are finished.
    """
    ended = read_ended(run)
    if ended is not None and ended.stands(config.stopping, config.trials):
        return summary(ended, config.trials) if done >= ended.asked else ""
    return summary(None, max(done, config.trials)) if done >= config.trials else ""


def settled(records: Sequence[Record], attempts: int) -> Record | None:
    """Return what came of a trial in the end, given its records by attempt; None if it is to be run (again)."""
    for record in records:
        if record.result is not None:
            return record
        if record.failure is not None and record.failure.kind not in RETRIED:
            return record
    return records[-1] if len(records) >= attempts else None


def write_proposal(run: Path, asked: Asked, attempt: int, config: dict[str, Any]) -> None:
    """Write into a trial's folder where it lies in the space, and its configuration as a recipe is written."""
    folder = trial_folder(run, asked.number, attempt)
    said = {"number": asked.number, "params": asked.params, "recipe": asked.recipe, "gain": asked.gain}
    write_json(folder / "proposal.json", said)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())


def next_attempt(run: Path, number: int) -> int:
    """Return the attempt, from 1, of which there is no folder yet, nor of any later one."""
    prefix = trial_folder(run, number, 0).name.removesuffix("0")
    names = [folder.name for folder in (run / "trials").glob(f"{prefix}*")]
    return max((int(name.rpartition("-")[2]) for name in names if name.rpartition("-")[2].isdigit()), default=0) + 1


def records_of(run: Path, number: int) -> list[Record]:
    """Return the sound records of one trial, by attempt."""
    folders = [trial_folder(run, number, attempt) for attempt in range(1, next_attempt(run, number))]
    return [record for record in map(read_record, folders) if record is not None]


def sound_record(run: Path, asked: Asked, attempt: int, config: TrialConfig | None, outcome: Outcome) -> Record:
    """Return the record that a worker made, or one that says why there is none, written now.

    A worker that was lost just after it had written its record has done its work.

    Raises:
        StorageError: the disk is full or not writable.
    """
    given = outcome.value if isinstance(outcome.value, Record) else None
    given = given or read_record(trial_folder(run, asked.number, attempt))
    result = given.result if given else None
    if given and result and math.isfinite(result.score) and math.isfinite(result.stderr):
        return given
    failure = outcome.failure or (given.failure if given else None)
    if failure is None and result is not None:
        failure = Failure(kind="nan", message=f"the score is {result.score} ± {result.stderr}")
    record = Record(
        number=asked.number,
        attempt=attempt,
        recipe=asked.recipe,
        config=config.to_dict() if config else None,
        result=None,
        failure=failure or Failure(kind="error", message="the worker gave no result"),
        environment=given.environment if given else {},
    )
    write_record(run, record)
    return record


def copied_record(run: Path, asked: Asked, config: TrialConfig, first: Record) -> Record:
    """Return a new record of a trial that has the configuration, and so the result, of the trial `first`."""
    assert first.result is not None
    attempt = next_attempt(run, asked.number)
    notes = {**first.result.notes, TWIN: float(first.number)}
    result = dataclasses.replace(first.result, notes=notes)
    record = dataclasses.replace(first, number=asked.number, attempt=attempt, recipe=asked.recipe, result=result)
    write_proposal(run, asked, attempt, config.to_dict())
    items = read_items(trial_folder(run, first.number, first.attempt))
    if items is not None:
        write_items(trial_folder(run, asked.number, attempt), items)
    write_record(run, record)
    return record


def commonest_cause(records: Sequence[Record]) -> str:
    """Return which kind of failure is the commonest, with an example."""
    failures = [record.failure for record in records if record.failure]
    if not failures:
        return "none has a record"
    (kind, count), *_ = Counter(failure.kind for failure in failures).most_common()
    example = next(failure for failure in failures if failure.kind == kind)
    place = f" in phase {example.phase}" if example.phase else ""
    return f"the commonest cause, {count} of {len(failures)}, is {kind}{place}: {example.message}"


def too_many_failed(records: Sequence[Record], share: float) -> str:
    """Return what to say if more than `share` of the last ten records (at least five) are failures, else nothing."""
    last = records[-WINDOW:]
    failed = [record for record in last if record.failure]
    if len(last) < LEAST_WINDOW or len(failed) <= share * len(last):
        return ""
    cause = commonest_cause(failed)
    return f"{len(failed)} of the last {len(last)} trials failed, more than a share of {share:g}; {cause}"
