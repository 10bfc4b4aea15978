"""Which models are finished at the end of a run, how, and which of them are not made yet: decisions, no work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.config import Component, FinalizeConfig, StudyConfig
from adasearch.documents import fingerprint, plain, value
from adasearch.errors import NoTrialError
from adasearch.loading import GGUF
from adasearch.records import DENSE, Evidence, FinalRecord, Record, forget_final, keep_earlier, read_finals, write_final
from adasearch.sections import ObjectiveConfig, TrainingRules
from adasearch.tradeoff import distinct_cuts, finished_first

if TYPE_CHECKING:
    from adasearch.display import Display
    from adasearch.tuning.items import Role

EFFECTIVE = ("seconds", "validation", "precision", "optimizer")
"""Rules of a training that decide what is learnt; the others decide how."""


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
        standing: export of the model, relative to the run, where it is made and only to be scored again; else empty.
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
    standing: str = ""
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


def made_by(task: FinalTask, study: StudyConfig) -> dict[str, str]:
    """Return fingerprints of what decides how a model is tuned and scored, by the section that may change in a run."""
    told: dict[str, object] = {"report": study.report}
    if task.recovery is not None:
        told["finalize.recovery"] = task.recovery.to_dict()
        told["finalize.training"] = [getattr(task.rules, name) for name in EFFECTIVE]
    return {section: fingerprint(plain(found)) for section, found in told.items()}


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


def format_label(wanted: Component) -> str:
    """Return what tells a format from others in a record, ``hf`` where its folder has no label."""
    return str(wanted.options.label or "hf")


def export_name(name: str, wanted: Component) -> str:
    """Return what the folder of a model in one format is called: ``trial7``, ``trial7.gguf-q8_0``."""
    label = wanted.options.label
    return f"{name}.{label}" if label else name


def to_make(study: StudyConfig, tasks: Iterable[FinalTask], run: Path, display: Display) -> dict[str, FinalTask]:
    """Return the tasks that are to be done, by name: those without a record, or with one that other settings made.

    A record of those settings stands, as a finalist's where the best recipe has become one.
    """
    held = {record.name: record for record in read_finals(run)}
    waiting = {}
    for task in tasks:
        record = held.get(task.name)
        changed = _changed(record, task, study) if record is not None else []
        if record is None or changed:
            waiting[task.name] = task
        elif task.role == "finalist" != record.role:
            write_final(run, dataclasses.replace(record, role=task.role))
        if record is not None and changed:
            standing = _standing(record, run) if changed == ["report"] else ""
            if standing:
                alone = dataclasses.replace(task.rules, processes=1)
                waiting[task.name] = dataclasses.replace(task, standing=standing, rules=alone)
            what = "scored" if standing or task.config is None else "made"
            display.note(f"{task.title} is {what} again: {', '.join(changed)} changed since it was {what}")
            keep_earlier(run, task.name)
            if not standing:
                forget_final(run, task.name)
    return waiting


def _standing(record: FinalRecord, run: Path) -> str:
    """Return the export that a model can be scored from again: not a GGUF file, whose weights are rounded."""
    folder = run / record.export if record.export else run
    return record.export or "" if (folder / "plan.json").is_file() and not (folder / GGUF).is_file() else ""


def _changed(record: FinalRecord, task: FinalTask, study: StudyConfig) -> list[str]:
    """Return the sections of the study by which a recorded model would come out otherwise today."""
    now = made_by(task, study)
    changed = [section for section, found in now.items() if record.made.get(section, found) != found]
    more = {format_label(wanted) for wanted in task.formats} - set(record.formats) if record.formats else set()
    return changed + (["finalize.formats"] if more else [])
