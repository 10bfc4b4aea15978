"""The end of a search, and all of a comparison: models are made, tuned, scored on report items and exported."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from adasearch import cuts, data, registry
from adasearch.conduct import CHECKPOINT, Conduct
from adasearch.config import StudyConfig, TaskScore, TrialConfig
from adasearch.environment import versions
from adasearch.errors import ConfigError, DataError, ModelError, NoTrialError, TrialError
from adasearch.finalists import FinalTask, export_name, finalists, format_label, made_by, to_make
from adasearch.pruning.plan import PruningPlan
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
from adasearch.sections import Metric
from adasearch.speed import exports_of, measure_exports
from adasearch.teams import Teams, followed
from adasearch.trial import Clock, Pruned, recover, score_blocks, silent, task_scores
from adasearch.tuning import alignment, evaluation
from adasearch.tuning.export import Goods, ModelCard, wants_adapters
from adasearch.tuning.export._card import score_sections
from adasearch.tuning.export._folder import amend_card, sweep
from adasearch.tuning.export._verify import open_export
from adasearch.tuning.recovery import RecoveryReport
from adasearch.verdicts import pronounce
from adasearch.winner import ACCURACY, SELECT, merits

if TYPE_CHECKING:
    from torch import nn

    from adasearch.display import Display, Update
    from adasearch.search.executor import Executor
    from adasearch.workbench import Workbench

ATTEMPTS = 2
LONGER = 10
"""How many times the seconds of a trial such a model may take: it has more items, and may be tuned for longer."""


def run_final(task: FinalTask, bench: Workbench) -> FinalRecord | None:
    """Make, score and export one model; its record is on disk before this returns.

    A process that only helped to train it returns None. A recovery that was interrupted goes on from its checkpoint.

    Raises:
        TrialError: it cannot be made, or training or scoring gave no finite figures.
    """
    folder = bench.run / "final" / task.name
    clock = Clock(state_writer(folder) if task.rank == 0 else silent)
    if task.standing:
        return _scored_again(task, bench, clock)
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
        made=made_by(task, bench.study),
    )
    if pruned is not None and task.formats:
        clock.enter("export")
        bench.release()  # what training held: the process that opens the export needs room on the same device
        record = _exported(pruned, task, record, bench)
    clock.enter("done")
    bench.assert_unchanged()
    del model, pruned
    bench.release()
    record = dataclasses.replace(record, seconds=clock.seconds, peak_bytes=clock.peak_bytes, gpu_bytes=clock.gpu_bytes)
    write_items(folder, items)
    write_final(bench.run, record)
    for done in (folder / CHECKPOINT, *folder.glob(cuts.PATTERN)):
        done.unlink(missing_ok=True)
    return record


def _scored_again(task: FinalTask, bench: Workbench, clock: Clock) -> FinalRecord:
    """Score a model as it was exported on what is reported now; its record and cards say so, nothing else changes.

    Its scores on select items stay, and with them its rank: a model that is opened again rounds otherwise.

    Raises:
        TrialError: the export is damaged.
    """
    export = bench.run / task.standing
    earlier = next(record for record in read_finals(bench.run) if record.name == task.name)
    try:
        outline = PruningPlan.load(export / "plan.json").outline
        model = open_export(export, str(bench.device))
    except ModelError as error:
        problem = f"it cannot be scored again: {error}; delete final/{task.name}.json to make it anew"
        raise TrialError("config", problem, clock.phase) from error
    scores, items = _score(model, dataclasses.replace(task, items=("report",)), bench, clock, outline)
    folder = bench.run / "final" / task.name
    selected = {key: values for key, values in (read_items(folder) or {}).items() if key.endswith(SELECT)}
    clock.enter("perplexity")
    record = dataclasses.replace(
        earlier,
        role=task.role,
        search=task.search,
        report=scores["report"],
        perplexity=_perplexity(model, bench, outline),
        made=made_by(task, bench.study),
    )
    clock.enter("done")
    dense = next((r for r in read_finals(bench.run) if r.role == "dense"), None)
    for standing in exports_of(bench.run, record).values():
        for section in score_sections(record, dense):
            amend_card(standing, section)
    write_items(folder, {**selected, **items})
    write_final(bench.run, record)
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
        conduct = Conduct(
            rules=task.rules,
            folder=bench.run / "final" / task.name,
            rank=task.rank,
            meeting=Path(task.meeting) if task.meeting else None,
        )
        pruned, conduct = cuts.obtain(config, bench, clock, conduct)
        if wants_adapters(task.formats):
            pruned = dataclasses.replace(pruned, beside={})
        bench.set_aside()
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


def _exported(pruned: Pruned, task: FinalTask, record: FinalRecord, bench: Workbench) -> FinalRecord:
    """Write a model in every format that is asked for, each a folder, and return its record with what came of that.

    A model that was exported before, and perhaps named by its rank, is replaced where it stands.

    Raises:
        TrialError: no format can hold it.
    """
    goods = _goods(pruned, task, record, bench)
    standing = exports_of(bench.run, record)
    written: list[str] = []
    unwritten: dict[str, str] = {}
    for wanted in task.formats:
        label = wanted.options.label
        folder = standing.get(label, bench.run / "export" / export_name(task.name, wanted))
        try:
            registry.EXPORT.get(wanted.type).function(goods, folder, wanted.options, overwrite=True)
            written.append(str(folder.relative_to(bench.run)))
        except ModelError as error:
            unwritten[format_label(wanted)] = str(error)
    if not written:
        raise TrialError("config", "; ".join(unwritten.values()), "export")
    formats = tuple(map(format_label, task.formats))
    return dataclasses.replace(record, export=written[0], formats=formats, unwritten=unwritten)


def _goods(pruned: Pruned, task: FinalTask, record: FinalRecord, bench: Workbench) -> Goods:
    """Return what the exports of a model are made of."""
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
    return Goods(
        model=pruned.model,
        base=pruned.base,
        structure=pruned.structure,
        plan=pruned.plan,
        card=card,
        beside=pruned.beside or {},
    )


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


def fill_cards(
    study: StudyConfig, run: Path, ranked: list[FinalRecord], say: Callable[[str], None]
) -> list[FinalRecord]:
    """Write into cards and records how the exports do beside others and what they take, and return the finalists.

    The best published recipe is exported too where it is no finalist, and told of like them.
    """
    exported = [*ranked, *(record for record in read_finals(run) if record.role == "recipe")]
    pronounce(study, run, exported)
    if study.finalize.measure:  # now that no worker computes
        exported = measure_exports(study, run, exported, say)
    return exported[: len(ranked)]


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
    sweep(run / "export")
    failures = finish(study, tasks, run, executor, display, seconds=seconds)
    judge(run, known)
    ranked = place_exports(run, study.objective.metric)
    ranked = fill_cards(study, run, ranked, display.note)
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
    study: StudyConfig, tasks: Iterable[FinalTask], run: Path, executor: Executor, display: Display, *, seconds: float
) -> dict[str, Failure]:
    """Make every model that `to_make` names, each again where its worker was lost.

    Returns:
        why models could not be made, by name; that is on disk too, and the next call tries them again.
    """
    waiting = to_make(study, tasks, run, display)
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
                text = f"failed: {failure.kind}: {failure.message}" if failure is not None else _scored(run, name)
                display.note(f"[{len(waiting) - len(open_tasks)}/{len(waiting)}] {waiting[name].title}: {text}")
                _show(update, waiting, open_tasks, "")
    return failures


def _scored(run: Path, name: str) -> str:
    """Return what is said of a model that is done: formats that could not be written are named with the reason."""
    lacking = next((record.unwritten for record in read_finals(run) if record.name == name), {})
    return "; ".join(["scored", *(f"no export {label}: {reason}" for label, reason in lacking.items())])


def _show(update: Update, waiting: Mapping[str, FinalTask], still: set[str], doing: str) -> None:
    """Tell a display how many models are made, and what is being done."""
    update(len(waiting) - len(still), doing)
