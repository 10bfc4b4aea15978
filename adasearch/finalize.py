"""After the search: full fine-tune of the best configurations, choice on select items, report items once, export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adasearch import data, registry
from adasearch.config import StudyConfig, TaskScore, TrialConfig
from adasearch.documents import plain, value
from adasearch.environment import versions
from adasearch.errors import NoTrialError
from adasearch.records import (
    DENSE,
    FinalRecord,
    Record,
    ranked_finals,
    read_finals,
    read_records,
    state_writer,
    write_final,
    write_items,
)
from adasearch.trial import Clock, Pruned, prune, recover, score_blocks, task_scores
from adasearch.tuning import evaluation
from adasearch.tuning.export import ModelCard

if TYPE_CHECKING:
    from torch import nn

    from adasearch.display import Display
    from adasearch.search.executor import Executor
    from adasearch.workbench import Workbench

ATTEMPTS = 2


@value
class FinalTask:
    """One model to fine-tune, score on select and report items and export; `config` None is the dense model."""

    name: str
    trial: int
    role: str
    recipe: str | None
    config: dict[str, Any] | None


def finalists(records: list[Record], top: int) -> list[FinalTask]:
    """Return what is finished after a search: the dense model, the `top` best trials, and the best recipe.

    Trials with equal configurations count once; a trial that was stopped early is never a finalist.

    Raises:
        NoTrialError: no trial was scored in full.
    """
    full = [r for r in records if r.number != DENSE and r.result is not None and not r.result.stopped]
    if not full:
        raise NoTrialError("no trial was scored in full: nothing to fine-tune")
    ranked = sorted(full, key=lambda r: (-r.result.score if r.result else 0.0, r.number))
    distinct = {str(r.config): r for r in reversed(ranked)}.values()
    chosen = {r.number: (r, "finalist") for r in [r for r in ranked if r in distinct][:top]}
    recipe = next((r for r in ranked if r.recipe), None)
    if recipe is not None:
        chosen.setdefault(recipe.number, (recipe, "recipe"))
    dense = FinalTask(name="dense", trial=DENSE, role="dense", recipe=None, config=None)
    return [dense] + [
        FinalTask(name=f"trial{number}", trial=number, role=role, recipe=record.recipe, config=record.config)
        for number, (record, role) in chosen.items()
    ]


def run_final(task: FinalTask, bench: Workbench) -> FinalRecord:
    """Fine-tune, score and export one model; its record is on disk before this returns.

    Raises:
        TrialError: training or scoring gave no finite figures.
    """
    folder = bench.run / "final" / task.name
    clock = Clock(state_writer(folder))
    dense = bench.structure().parameters
    pruned: Pruned | None = None
    losses: tuple[float, ...] = ()
    if task.config is not None:
        config = TrialConfig.from_dict(task.config, "trial")
        pruned = prune(config, bench, clock)
        losses = recover(pruned, bench.study.finalize.recovery, config, bench, clock).losses
    model = bench.dense() if pruned is None else pruned.model
    parameters = dense if pruned is None else pruned.plan.parameters
    clock.enter("select")
    selected, _ = _score(model, bench, "select")
    clock.enter("report")
    reported, items = _score(model, bench, "report")
    clock.enter("perplexity")
    record = FinalRecord(
        name=task.name,
        trial=task.trial,
        role=task.role,
        recipe=task.recipe,
        selected=selected,
        report=reported,
        perplexity=_perplexity(model, bench),
        parameters=parameters,
        removed=1 - parameters / dense,
        seconds={},
        export=None,
        losses=losses,
    )
    clock.enter("export")
    export = _export(pruned, task, record, bench) if pruned is not None else None
    clock.enter("done")
    record = dataclasses.replace(record, seconds=clock.seconds, export=export)
    write_items(folder, items)
    write_final(bench.run, record)
    return record


def _score(model: nn.Module, bench: Workbench, role: Any) -> tuple[tuple[TaskScore, ...], dict[str, np.ndarray]]:
    """Return the scores of each task, and for the report's paired differences each item's margin and correctness."""
    tasks = bench.items(role)
    logliks = score_blocks(model, {name: task.encoded for name, task in tasks.items()})
    values: dict[str, np.ndarray] = {}
    for name, task in tasks.items():
        values[name] = evaluation.item_values(task.items, logliks[name], "margin")
        values[f"{name}#acc"] = evaluation.item_values(task.items, logliks[name], "acc_norm")
    return task_scores(tasks, logliks), values


def _perplexity(model: nn.Module, bench: Workbench) -> dict[str, float]:
    found: dict[str, float] = {}
    report = bench.study.report
    for corpus in report.perplexity:
        tokens = data.perplexity_tokens(bench.base.tokenizer, corpus, bench.study.data_root)[: report.perplexity_tokens]
        for window in report.windows:
            if len(tokens) >= window:
                found[f"{corpus}@{window}"] = evaluation.perplexity(model, tokens, window)
    return found


def _export(pruned: Pruned, task: FinalTask, record: FinalRecord, bench: Workbench) -> str:
    folder = bench.run / "export" / task.name
    study = bench.study
    card = ModelCard(
        model=study.model.name,
        study=study.name,
        trial=task.trial,
        recipe=task.recipe,
        config=task.config,
        budget=plain(study.budget),
        recovery=study.finalize.recovery.to_dict(),
        record=record,
        dense=next((r for r in read_finals(bench.run) if r.role == "dense"), None),
        dense_parameters=bench.structure().parameters,
        seed=study.seed,
        versions=versions(),
        command=f"adasearch replay RUN --trial {task.trial}",
    )
    for name in study.finalize.formats:
        export = registry.EXPORT.get(name).function
        export(pruned.model, bench.base, pruned.structure, pruned.plan, folder, card, overwrite=True)
    return str(folder.relative_to(bench.run))


def place_exports(run: Path) -> list[FinalRecord]:
    """Name the exports of the finalists by their rank, ``<rank>-trial<number>``, and return the finalists, best first.

    This is the last step and may be repeated: wherever an export lies, it ends under its name.
    """
    ranked = ranked_finals(r for r in read_finals(run) if r.role == "finalist")
    moved = []
    for rank, record in enumerate(ranked, start=1):
        goal = run / "export" / f"{rank}-{record.name}"
        lies = next((p for p in (run / "export").glob(f"*{record.name}") if p.name.split("-")[-1] == record.name), goal)
        if lies != goal:
            lies.rename(goal)
        moved.append(dataclasses.replace(record, export=str(goal.relative_to(run))))
        write_final(run, moved[-1])
    return moved


def finalize(study: StudyConfig, run: Path, executor: Executor, display: Display) -> list[FinalRecord]:
    """Finish the search: run every finalist that has no record yet, rank them, and return them, best first.

    Raises:
        NoTrialError: no trial was scored in full, or no finalist could be finished.
    """
    tasks = finalists(read_records(run), study.finalize.top)
    known = {record.name for record in read_finals(run)}
    waiting = {task.name: task for task in tasks if task.name not in known}
    if waiting:
        display.note(f"fine-tuning and scoring {len(waiting)} models on report items: {', '.join(waiting)}")
    failures = _finish(waiting, executor, display, seconds=study.limits.trial_seconds * 10)
    ranked = place_exports(run)
    if not ranked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise NoTrialError(f"no finalist could be finished: {reasons or 'no reason recorded'}")
    return ranked


def _finish(waiting: dict[str, FinalTask], executor: Executor, display: Display, *, seconds: float) -> dict[str, str]:
    """Run all tasks, each again where its worker was lost, and return why the others failed, by name."""
    attempts = dict.fromkeys(waiting, 1)
    failures: dict[str, str] = {}
    for name, task in waiting.items():
        executor.submit(name, task, seconds=seconds)
    open_tasks = set(waiting)
    while open_tasks:
        for outcome in executor.wait(1.0):
            failure = outcome.failure
            if failure is not None and failure.kind == "worker_lost" and attempts[outcome.key] < ATTEMPTS:
                attempts[outcome.key] += 1
                executor.submit(outcome.key, waiting[outcome.key], seconds=seconds)
                continue
            open_tasks.discard(outcome.key)
            if failure is not None:
                failures[outcome.key] = f"{failure.kind}: {failure.message}"
            text = f"failed: {failures[outcome.key]}" if failure is not None else "scored"
            display.note(f"final {len(waiting) - len(open_tasks)}/{len(waiting)}: {outcome.key} {text}")
    return failures
