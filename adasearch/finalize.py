"""The end of a search, and all of a comparison: models are made, tuned, scored on report items and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adasearch import data, registry
from adasearch.conduct import CHECKPOINT, Conduct
from adasearch.config import Component, FinalizeConfig, StudyConfig, TaskScore, TrialConfig
from adasearch.documents import value
from adasearch.environment import versions
from adasearch.errors import ConfigError, DataError, NoTrialError, TrialError
from adasearch.pruning.structure import WHOLE, Outline
from adasearch.racing import TaskValues
from adasearch.records import (
    DENSE,
    Evidence,
    Failure,
    FinalRecord,
    Record,
    ranked_finals,
    read_finals,
    read_items,
    read_records,
    state_writer,
    trial_folder,
    write_failure,
    write_final,
    write_items,
)
from adasearch.sections import Metric, ObjectiveConfig, TrainingRules
from adasearch.speed import exports_of, measure_exports
from adasearch.teams import Teams, followed
from adasearch.tradeoff import distinct_cuts, finished_first
from adasearch.trial import Clock, Pruned, prune, recover, score_blocks, silent, task_scores
from adasearch.tuning import alignment, evaluation
from adasearch.tuning.export import Goods, ModelCard, wants_adapters
from adasearch.tuning.recovery import RecoveryReport
from adasearch.verdicts import pronounce
from adasearch.winner import ACCURACY, SELECT, merits

if TYPE_CHECKING:
    from torch import nn

    from adasearch.display import Display, Update
    from adasearch.search.executor import Executor
    from adasearch.tuning.items import Role
    from adasearch.workbench import Workbench

ATTEMPTS = 2
LONGER = 10
"""How many times the seconds of a trial such a model may take: it has more items, and may be tuned for longer."""


@value
class FinalTask:
    """One model to make, score on items that no search saw, and perhaps export.

    Args:
        name: of its record and its export.
        trial: see `FinalRecord`.
        role: see `FinalRecord`.
        recipe: the published recipe that it is, if any.
        config: ``TrialConfig.to_dict()``, None for the dense model.
        recovery: how it is tuned after the cut, None for the dense model.
        items: on which items it is scored.
        formats: in which it is exported.
        command: what makes it again, for its model card.
        search: what the search knows of it, None where there was none.
        rules: of its recovery.
        rank: of this process among those that make it together; the first one scores and exports.
        meeting: folder in which they meet, None where there is one.
    """

    name: str
    trial: int
    role: str
    recipe: str | None = None
    config: dict[str, Any] | None = None
    recovery: Component | None = None
    rules: TrainingRules = TrainingRules()
    rank: int = 0
    meeting: str | None = None
    items: tuple[Role, ...] = ("select", "report")
    formats: tuple[Component, ...] = ()
    command: str = ""
    search: Evidence | None = None

    @property
    def title(self) -> str:
        """Return what the model is called in a line for the user."""
        return self.recipe or self.name


def dense_task(items: tuple[Role, ...] = ("select", "report")) -> FinalTask:
    """Return the task of scoring the dense model."""
    return FinalTask(name="dense", trial=DENSE, role="dense", items=items)


def finalists(
    records: list[Record],
    wanted: FinalizeConfig,
    known: Mapping[int, Evidence] | None = None,
    objective: ObjectiveConfig | None = None,
) -> list[FinalTask]:
    """Return what is finished after a search: the dense model, the best trials, and the best recipe.

    The best ones are those of the highest posterior mean, or score where there is no posterior: the highest of many
    noisy scores belongs to a lucky trial as often as to a good one. Trials that differ in their recovery alone count
    once, as the recipe if one of them is one: tuned alike at the end they are the same model. One that was stopped
    early is never a finalist, though its score has its say in the posterior, nor is one that breaks a hard limit of the
    objective. With several objectives the best are spread along the front, see `tradeoff`.

    Args:
        records: of the search.
        wanted: how many, and how they are finished.
        known: what the search knows of each trial, see `adasearch.search.belief.evidence`.
        objective: of the study; None has one, and no limits.

    Raises:
        NoTrialError: no trial was scored in full, or none keeps the limits.
    """
    found = {r.number: r for r in records if r.number != DENSE and r.result is not None and not r.result.stopped}
    if not found:
        raise NoTrialError("no trial was scored in full: nothing to fine-tune")
    objective = objective or ObjectiveConfig(search=())
    kept = {n: r for n, r in found.items() if r.result and objective.admits(r.result.shares)}
    if not kept:
        limits = ", ".join(f"{cost} {limit:g}" for cost, limit in objective.at_most.items())
        raise NoTrialError(f"none of {len(found)} trials keeps objective.at_most ({limits}): nothing to fine-tune")
    known = known or {}
    scores = {number: _believed(record, known.get(number)) for number, record in kept.items()}
    ranked = sorted(kept.values(), key=lambda r: (-scores[r.number], r.number))
    cuts = distinct_cuts(ranked)
    chosen = {r.number: (r, "finalist") for r in finished_first(objective, cuts, wanted.top)}
    recipe = next((r for r in cuts if r.recipe), None)
    if recipe is not None:
        chosen.setdefault(recipe.number, (recipe, "recipe"))
    return [dense_task()] + [
        FinalTask(
            name=f"trial{number}",
            trial=number,
            role=role,
            recipe=record.recipe,
            config=record.config,
            recovery=wanted.recovery,
            rules=wanted.training,
            formats=wanted.formats,
            command=f"adasearch replay RUN --trial {number}",
            search=known.get(number),
        )
        for number, (record, role) in chosen.items()
    ]


def _believed(record: Record, evidence: Evidence | None) -> float:
    """Return what the search believes of a trial's score; the score where nothing is known of it."""
    assert record.result is not None
    return record.result.score if evidence is None else evidence.believed


def run_final(task: FinalTask, bench: Workbench) -> FinalRecord | None:
    """Make, score and export one model; its record is on disk before this returns.

    A process that only helped to train it returns None. A recovery that was interrupted goes on from its checkpoint.

    Raises:
        TrialError: it cannot be made, or training or scoring gave no finite figures.
    """
    folder = bench.run / "final" / task.name
    clock = Clock(state_writer(folder) if task.rank == 0 else silent)
    pruned, tuned = _made(task, bench, clock)
    if task.rank > 0:
        del pruned
        bench.release()
        return None
    model, outline = (bench.dense(), WHOLE) if pruned is None else (pruned.model, pruned.structure.outline)
    scores, items = _score(model, task, bench, clock, outline)
    clock.enter("perplexity")
    perplexity = _perplexity(model, bench, outline)
    dense = bench.structure().parameters
    parameters = dense if pruned is None else pruned.plan.parameters
    record = FinalRecord(
        name=task.name,
        trial=task.trial,
        role=task.role,
        recipe=task.recipe,
        selected=scores.get("select", ()),
        report=scores.get("report", ()),
        perplexity=perplexity,
        parameters=parameters,
        removed=1 - parameters / dense,
        seconds={},
        export=None,
        losses=tuned.losses,
        search=task.search,
        validation=tuned.validation,
        ended=tuned.ended,
        dropped=tuned.dropped,
        epochs=tuned.epochs,
    )
    if pruned is not None and task.formats:
        clock.enter("export")
        record = dataclasses.replace(record, export=_export(pruned, task, record, bench))
    clock.enter("done")
    bench.assert_unchanged()
    del model, pruned
    bench.release()
    record = dataclasses.replace(record, seconds=clock.seconds, peak_bytes=clock.peak_bytes, gpu_bytes=clock.gpu_bytes)
    write_items(folder, items)
    write_final(bench.run, record)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return record


def _made(task: FinalTask, bench: Workbench, clock: Clock) -> tuple[Pruned | None, RecoveryReport]:
    """Return the model of a task, cut and tuned, and what was done; no model for the dense one.

    What a configuration asks for and cannot have is the failure of this model, and no reason to stop with the others.
    """
    if task.config is None:
        return None, RecoveryReport()
    assert task.recovery is not None, f"{task.name}: a configuration comes with its recovery"
    try:
        config = TrialConfig.from_dict(task.config, "trial")
        pruned = prune(config, bench, clock)
        if wants_adapters(task.formats):
            pruned = dataclasses.replace(pruned, beside={})
        bench.set_aside()
        conduct = Conduct(
            rules=task.rules,
            folder=bench.run / "final" / task.name,
            rank=task.rank,
            meeting=Path(task.meeting) if task.meeting else None,
        )
        return pruned, recover(pruned, task.recovery, config, bench, clock, conduct)
    except (ConfigError, DataError) as error:
        raise TrialError("config", str(error), clock.phase) from error


def _score(
    model: nn.Module, task: FinalTask, bench: Workbench, clock: Clock, outline: Outline
) -> tuple[dict[str, tuple[TaskScore, ...]], dict[str, np.ndarray]]:
    """Return the scores of each role's tasks, and for paired differences the values of their items.

    These are the study's metric and correctness of each report item, and that metric of each select item.
    """
    metric = bench.study.objective.metric
    scores: dict[str, tuple[TaskScore, ...]] = {}
    values: dict[str, np.ndarray] = {}
    for role in task.items:
        clock.enter(role)
        tasks = bench.items(role, outline)
        logliks = score_blocks(model, {name: found.encoded for name, found in tasks.items()})
        scores[role] = task_scores(tasks, logliks)
        for name, found in tasks.items() if role == "report" else ():
            values[name] = evaluation.item_values(found.items, logliks[name], metric)
            values[f"{name}{ACCURACY}"] = evaluation.item_values(found.items, logliks[name], "acc_norm")
        for name, found in tasks.items() if role == "select" else ():
            values[f"{name}{SELECT}"] = evaluation.item_values(found.items, logliks[name], metric)
    return scores, values


def _perplexity(model: nn.Module, bench: Workbench, outline: Outline) -> dict[str, float]:
    """Return the perplexity of each corpus and window, per token of the dense model's tokenizer."""
    found: dict[str, float] = {}
    report, reference = bench.study.report, bench.base.tokenizer
    for corpus in report.perplexity:
        tokens = bench.perplexity_tokens(corpus)
        for window in (w for w in report.windows if len(tokens) >= w):
            if outline.tokens is None:
                value = evaluation.perplexity(model, tokens, window)
            else:
                text = data.perplexity_text(corpus, bench.study.data_root)
                own = bench.outlined(outline).tokenizer
                value = alignment.aligned_perplexity(model, alignment.align(text, reference, own, window, len(tokens)))
            found[f"{corpus}@{window}"] = value
    return found


def _export(pruned: Pruned, task: FinalTask, record: FinalRecord, bench: Workbench) -> str:
    """Write a model in every format that is asked for, each a folder, and return the first one relative to the run."""
    study = bench.study
    card = ModelCard(
        model=study.model.name,
        study="" if task.role == "pruned" else study.name,
        trial=None if task.role == "pruned" else task.trial,
        recipe=task.recipe,
        config=task.config,
        budget=(
            study.budget_of(TrialConfig.from_dict(task.config, "trial")) if task.config else study.budget
        ).to_dict(),
        recovery=task.recovery.to_dict() if task.recovery and task.recovery.type != "none" else None,
        record=record,
        dense=next((r for r in read_finals(bench.run) if r.role == "dense"), None),
        dense_parameters=bench.structure().parameters,
        seed=study.seed,
        versions=versions(),
        command=task.command,
    )
    goods = Goods(
        model=pruned.model,
        base=pruned.base,
        structure=pruned.structure,
        plan=pruned.plan,
        card=card,
        beside=pruned.beside or {},
    )
    folders = [bench.run / "export" / export_name(task.name, wanted) for wanted in task.formats]
    for wanted, folder in zip(task.formats, folders, strict=True):
        registry.EXPORT.get(wanted.type).function(goods, folder, wanted.options, overwrite=True)
    return str(folders[0].relative_to(bench.run))


def export_name(name: str, wanted: Component) -> str:
    """Return what the folder of a model in one format is called: ``trial7``, ``trial7.gguf-q8_0``."""
    label = wanted.options.label
    return f"{name}.{label}" if label else name


def judge(run: Path, known: Mapping[int, Evidence]) -> None:
    """Write into the records of finalists and of the best recipe what they are ranked by; see `winner.merits`.

    What the search knows of them is written anew: it may have gone on since they were made.
    """
    finals = [r for r in read_finals(run) if r.role in {"finalist", "recipe"}]
    finals = [dataclasses.replace(r, search=known.get(r.trial, r.search)) for r in finals]
    items = [_select_items(run, record.name) for record in finals]
    if not all(items):
        return
    found = merits([r.search for r in finals], items)
    for record, merit in zip(finals, found, strict=True):
        write_final(run, dataclasses.replace(record, merit=merit))


def _select_items(run: Path, name: str) -> dict[str, np.ndarray]:
    items = read_items(run / "final" / name) or {}
    return {key.removesuffix(SELECT): x for key, x in items.items() if key.endswith(SELECT)}


def place_exports(run: Path, metric: Metric) -> list[FinalRecord]:
    """Name the exports of the finalists by their rank, and return the finalists, best first.

    A folder is called ``<rank>-trial<number>``, followed by the label of its format. This is the last step and may be
    repeated: wherever an export lies, it ends under its name.
    """
    ranked = ranked_finals((r for r in read_finals(run) if r.role == "finalist"), metric)
    moved = []
    for rank, record in enumerate(ranked, start=1):
        for label, lies in exports_of(run, record).items():
            wanted = f"{rank}-{record.name}" + (f".{label}" if label else "")
            if lies.name != wanted:
                lies.rename(lies.with_name(wanted))
        name = record.export and re.sub(r"^\d+-", "", Path(record.export).name)
        moved.append(dataclasses.replace(record, export=f"export/{rank}-{name}" if name else None))
        write_final(run, moved[-1])
    return moved


def finalize(study: StudyConfig, run: Path, executor: Executor, display: Display) -> list[FinalRecord]:
    """Finish the search: run every finalist that has no record yet, rank them, and return them, best first.

    Raises:
        NoTrialError: no trial was scored in full, or no finalist could be finished.
    """
    records = read_records(run)
    known, obstacle = _known(study, run, records)
    if obstacle:
        display.note(f"finalists are chosen by their observed scores: {obstacle}")
    tasks = finalists(records, study.finalize, known, study.objective)
    seconds = study.limits.trial_seconds * LONGER + (study.finalize.training.seconds or 0.0)
    failures = finish(tasks, run, executor, display, seconds=seconds)
    judge(run, known)
    ranked = place_exports(run, study.objective.metric)
    pronounce(study, run, ranked)
    if study.finalize.measure:  # now that no worker computes
        ranked = measure_exports(study, run, ranked, display.note)
    if not ranked:
        reasons = "; ".join(f"{name}: {failure.kind}: {failure.message}" for name, failure in failures.items())
        raise NoTrialError(f"no finalist could be finished: {reasons or 'no reason recorded'}")
    return ranked


def _known(study: StudyConfig, run: Path, records: list[Record]) -> tuple[dict[int, Evidence], str]:
    """Return what the search knows of its trials, and why it has no posterior of them, if so."""
    # here, because workers import this module and have no use for the optimizer
    from adasearch.search.belief import evidence
    from adasearch.search.noise import paired_errors
    from adasearch.search.space import Space

    items: dict[bool, dict[int, TaskValues]] = {True: {}, False: {}}
    for record in records:
        values = read_items(trial_folder(run, record.number, record.attempt)) if record.result else None
        if values and record.result and record.number != DENSE:
            items[record.result.stopped][record.number] = values
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    return evidence(space, records, paired_errors(items[False], items[True]))


def finish(
    tasks: Iterable[FinalTask], run: Path, executor: Executor, display: Display, *, seconds: float
) -> dict[str, Failure]:
    """Make every model that has no record in `run` yet, each again where its worker was lost.

    Returns:
        why models could not be made, by name; that is on disk too, and the next call tries them again.
    """
    known = {record.name for record in read_finals(run)}
    waiting = {task.name: task for task in tasks if task.name not in known}
    if waiting:
        display.note(f"to make and score on report items: {', '.join(task.title for task in waiting.values())}")
    attempts = dict.fromkeys(waiting, 1)
    failures: dict[str, Failure] = {}
    teams = Teams(executor, run)
    for task in waiting.values():
        teams.submit(task, seconds=seconds)
    open_tasks = set(waiting)
    if not waiting:
        return failures
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(display.stage("models", len(waiting)))
        stack.enter_context(followed(run, waiting, functools.partial(_show, update, waiting, open_tasks)))
        while open_tasks:
            for outcome in teams.wait(1.0):
                name, failure = outcome.key, outcome.failure
                if failure is not None and failure.kind == "worker_lost" and attempts[name] < ATTEMPTS:
                    attempts[name] += 1
                    teams.submit(waiting[name], seconds=seconds)
                    continue
                open_tasks.discard(name)
                if failure is not None:
                    failures[name] = failure
                    write_failure(run, name, failure)
                text = f"failed: {failure.kind}: {failure.message}" if failure is not None else "scored"
                display.note(f"[{len(waiting) - len(open_tasks)}/{len(waiting)}] {waiting[name].title}: {text}")
                _show(update, waiting, open_tasks, "")
    return failures


def _show(update: Update, waiting: Mapping[str, FinalTask], still: set[str], doing: str) -> None:
    """Tell a display how many models are made, and what is being done."""
    update(len(waiting) - len(still), doing)
