"""What came of a trial: from a worker's answer to the record that stands, and when failures are too many."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adasearch.config import TrialConfig
from adasearch.records import (
    Failure,
    Record,
    read_items,
    read_record,
    trial_folder,
    write_items,
    write_record,
)
from adasearch.search.executor import Outcome
from adasearch.search.study import Asked, next_attempt, write_proposal

WINDOW, LEAST_WINDOW = 10, 5


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
    notes = {**first.result.notes, "same_trial_as": float(first.number)}
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
