"""What runs in a worker process: opens a workbench once, then turns tasks of the driver into records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch import models
from adasearch.config import StudyConfig
from adasearch.environment import machine
from adasearch.finalists import FinalTask
from adasearch.finalize import run_final
from adasearch.racing import Race
from adasearch.records import Record, read_items, state_writer, write_items, write_record
from adasearch.search.driver import Assignment
from adasearch.trial import run_trial
from adasearch.workbench import Workbench

if TYPE_CHECKING:
    from adasearch.records import FinalRecord


def open_worker(study: StudyConfig, run: str, threads: int, gpu_memory: float | None = None) -> Callable[[Any], Any]:
    """Return the function that does a worker's tasks: `Assignment` -> `Record`, `FinalTask` -> `FinalRecord`.

    Args:
        study: the resolved study.
        run: run folder.
        threads: CPU threads of the worker.
        gpu_memory: share of its GPU's memory that it may take, None for all.
    """
    if gpu_memory is not None:
        models.limit_gpu_memory(gpu_memory)
    bench = Workbench(study, Path(run), threads)

    def work(task: Assignment | FinalTask) -> Record | FinalRecord | None:
        return run_final(task, bench) if isinstance(task, FinalTask) else run_assignment(task, bench)

    return work


def environment(bench: Workbench) -> dict[str, str]:
    """Return what a trial's figures depend on beside its configuration."""
    return {
        **machine(),
        "device": str(bench.device),
        "dtype": str(bench.base.dtype).removeprefix("torch."),
        "threads": str(bench.threads),
    }


def run_assignment(task: Assignment, bench: Workbench) -> Record:
    """Run one attempt at a trial; its record is on disk before this returns."""
    folder = Path(task.folder)
    rival = read_items(Path(task.incumbent)) if task.incumbent else None
    race = Race(rival=rival, stops=not task.control) if rival else None
    result, items = run_trial(task.config, bench, state_writer(folder), race, task.gates)
    if items:  # a trial that stopped before its score has none
        write_items(folder, items)
    record = Record(number=task.number, attempt=task.attempt, recipe=task.recipe, config=task.config, result=result,
                    failure=None, environment=environment(bench))  # fmt: skip
    write_record(bench.run, record)
    return record
