"""Trials between asking and telling: in which order, what came of them in the end, and what lies in their folders."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from adasearch.config import StudyConfig, TrialConfig
from adasearch.documents import value
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

WINDOW, LEAST_WINDOW = 10, 5
RETRIED = frozenset({"memory", "timeout", "worker_lost"})
TWIN = "same_trial_as"
"""Note of a trial that took the result of an earlier one, with its number."""


@value
class Asked:
    """A trial of the study: where it lies in the space, which recipe it is if any, and whether it has been told."""

    number: int
    params: dict[str, Any]
    recipe: str | None
    told: bool


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


def lag(workers: int) -> int:
    """Return how far telling stays behind asking: trial n is asked when exactly those up to n - lag are told.

    With several workers one finished trial may wait to be told, so that a worker need not wait for the slowest.
    """
    return 1 if workers == 1 else workers + 1


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
    write_json(folder / "proposal.json", {"number": asked.number, "params": asked.params, "recipe": asked.recipe})
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
