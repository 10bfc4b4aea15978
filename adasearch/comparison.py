"""A comparison: the dense model and every recipe on one model and budget, and what their records say.

A recipe is one task of `finalize`: cut on the study's calibration sample, tuned as a trial of the study is, scored on
the report items. Its record is named after the recipe and the key of its whole configuration, so what a recipe or the
study's `trial` says anew is made anew, and all else is taken from the records.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.checks import trainings_of
from adasearch.config import STUDYS_OWN, StudyConfig, TrialConfig, merged
from adasearch.documents import join
from adasearch.errors import ConfigError, NoTrialError
from adasearch.finalists import FinalTask, dense_task
from adasearch.finalize import LONGER, finish
from adasearch.footprint import Training
from adasearch.library import load_recipe, recipe_names
from adasearch.records import Failure, FinalRecord, read_failures, read_finals, write_atomically
from adasearch.registry import nearest
from adasearch.report import Difference, difference, mean_score, report_score
from adasearch.sections import TrainingRules

if TYPE_CHECKING:
    from adasearch.display import Display
    from adasearch.search.executor import Executor

SHARED = ("model", "budget", "objective", "report", "seed")
"""Sections of a study that all rows of a comparison share; they may not change while it goes on."""
OWN = STUDYS_OWN
"""Sections that a recipe may fix for itself, which ends the comparison at equal cost; such rows are marked."""
PRUNING = ("calibrate", "plan", "learn", "cut")
"""Phases that make the smaller model; statistics are computed once for all recipes, so the first one pays for them."""


def with_recipes(study: StudyConfig, names: Sequence[str] | None, path: Path) -> StudyConfig:
    """Return the study with the recipes to compare in place of its own.

    Args:
        study: as read.
        names: of recipes, None for all of ``search_spaces/recipes`` and those that the study holds itself.
        path: the study's file.

    Raises:
        ConfigError: an unknown recipe, with the nearest known one, or one that is no trial.
    """
    known = dict.fromkeys((*recipe_names(path), *study.recipes))
    chosen: dict[str, dict[str, Any]] = {}
    for name in known if names is None else names:
        if name not in known and not name.endswith((".yaml", ".yml")):
            raise ConfigError("--recipes", f"unknown recipe {name!r}; {nearest(name, known)}")
        own = study.recipes.get(name)
        chosen[name] = load_recipe(name, path, "--recipes") if own is None else own
        _config(study, name, chosen[name])
    if not chosen:
        raise ConfigError("--recipes", f"must name at least one recipe; {nearest('', known)}")
    return dataclasses.replace(study, recipes=chosen, all_recipes=False)


def _config(study: StudyConfig, name: str, recipe: dict[str, Any]) -> TrialConfig:
    """Return the trial that a recipe is in a study."""
    base = {**study.trial, "seed": study.seed}
    return TrialConfig.from_dict(merged(base, recipe), join("recipes", name))


def tasks_of(study: StudyConfig) -> list[FinalTask]:
    """Return what is made and scored: the dense model, then the recipes in the order of the study."""
    tasks = [dense_task(items=("report",))]
    for number, (name, recipe) in enumerate(study.recipes.items()):
        config = _config(study, name, recipe)
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-")
        tasks.append(
            FinalTask(
                name=f"{stem}-{config.key}",
                trial=number,
                role="compared",
                recipe=name,
                config=config.to_dict(),
                recovery=config.recovery,
                rules=rules_of(study),
                items=("report",),
            )
        )
    return tasks


def rules_of(study: StudyConfig) -> TrainingRules:
    """Return how the recovery of a recipe is run: as a finalist's, for as long as it says itself, by one process."""
    return dataclasses.replace(study.finalize.training, seconds=None, validation=None, processes=1)


def trained(study: StudyConfig) -> tuple[Training, ...]:
    """Return the trainings of all recipes."""
    parts = (trainings_of(_config(study, name, recipe), rules_of(study)) for name, recipe in study.recipes.items())
    return tuple(itertools.chain.from_iterable(parts))


def compare(study: StudyConfig, run: Path, executor: Executor, display: Display) -> None:
    """Make and score the dense model and every recipe that has no record in `run` yet."""
    finish(study, tasks_of(study), run, executor, display, seconds=study.limits.trial_seconds * LONGER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the leaderboard.

    Args:
        name: of the recipe, or ``dense``.
        final: its record, None where there is none.
        failure: why there is none; None too where its turn is still to come.
        own: sections of `OWN` that the recipe fixes for itself.
        versus_best: paired difference of its score to that of the best recipe; None for that one and without a record.
    """

    name: str
    final: FinalRecord | None
    failure: Failure | None
    own: tuple[str, ...] = ()
    versus_best: Difference | None = None

    @property
    def score(self) -> tuple[float, float]:
        """Return the mean over the report tasks and its standard error, nan where there is none."""
        return mean_score(self.final.report) if self.final else (math.nan, math.nan)

    @property
    def peak_bytes(self) -> int:
        """Return the greatest memory of its worker: of the tensors on a GPU where there is one, else resident."""
        return (self.final.gpu_bytes or self.final.peak_bytes) if self.final else 0

    @property
    def state(self) -> str:
        """Return ``done``, ``failed`` or ``waiting``."""
        return "done" if self.final else "failed" if self.failure else "waiting"

    @property
    def reason(self) -> str:
        """Return why the recipe has no score, the empty text where it has one or is still to come."""
        return f"{self.failure.kind}: {self.failure.message}" if self.failure and not self.final else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a comparison found: the dense model, and the recipes, best score first, those without one last."""

    study: StudyConfig
    dense: Row
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """Return the recipe of the best score."""
        return next((row for row in self.rows if row.final), None)

    @property
    def corpora(self) -> tuple[str, ...]:
        """Return the names ``<corpus>@<window>`` of all perplexities, in the order of the study."""
        found = (name for row in (self.dense, *self.rows) if row.final for name in row.final.perplexity)
        return tuple(dict.fromkeys(found))


def gather(run: Path, study: StudyConfig) -> Comparison:
    """Return what the records of a comparison say of the recipes of `study`."""
    finals = {final.name: final for final in read_finals(run)}
    failures = read_failures(run)
    dense, *tasks = tasks_of(study)

    def place(task: FinalTask) -> tuple[float, int]:
        score = mean_score(finals[task.name].report)[0] if task.name in finals else math.nan
        return (math.inf if math.isnan(score) else -score, task.trial)

    tasks.sort(key=lambda task: (task.name not in finals, task.name not in failures, place(task)))
    best = next((finals[task.name] for task in tasks if task.name in finals), None)

    def row(task: FinalTask) -> Row:
        final = finals.get(task.name)
        own = tuple(key for key in OWN if key in study.recipes.get(task.recipe or "", {}))
        versus = difference(run, final, best, study.seed)
        return Row(name=task.title, final=final, failure=failures.get(task.name), own=own, versus_best=versus)

    return Comparison(study=study, dense=row(dense), rows=tuple(map(row, tasks)))


def _figures(found: Comparison, row: Row, rank: int | None) -> dict[str, object]:
    """Return a row of ``leaderboard.csv``; what is not known is left out."""
    whole, versus, final = found.dense.score[0], row.versus_best, row.final
    figures: dict[str, object] = {"rank": rank, "recipe": row.name, "state": row.state, "own": " ".join(row.own)}
    if final is None:
        return {**figures, "reason": row.reason}
    score, stderr = row.score
    figures |= {"score": score, "stderr": stderr, "retained": score / whole if whole else math.nan}
    if versus is not None:
        figures |= {"to_best": versus.mean, "to_best_low": versus.low, "to_best_high": versus.high}
    for task in final.report:
        figures[task.task], figures[f"{task.task} stderr"] = report_score(task)
    figures |= {f"perplexity {name}": number for name, number in final.perplexity.items()}
    seconds = final.seconds
    return {
        **figures,
        "parameters": final.parameters,
        "removed": final.removed,
        "seconds": sum(seconds.values()),
        "pruning_seconds": sum(seconds.get(phase, 0.0) for phase in PRUNING),
        "recovery_seconds": seconds.get("recover", 0.0),
        "peak_bytes": final.peak_bytes,
        "gpu_bytes": final.gpu_bytes,
    }


def columns(found: Comparison) -> tuple[str, ...]:
    """Return the columns of ``leaderboard.csv``."""
    tasks = [name for task in found.study.report.tasks for name in (task, f"{task} stderr")]
    return (
        "rank", "recipe", "state", "score", "stderr", "retained", "to_best", "to_best_low", "to_best_high", *tasks,
        *(f"perplexity {name}" for name in found.corpora), "parameters", "removed", "seconds", "pruning_seconds",
        "recovery_seconds", "peak_bytes", "gpu_bytes", "own", "reason",
    )  # fmt: skip


def write_leaderboard(run: Path, found: Comparison) -> None:
    """Write ``leaderboard.csv``: the dense model, then the recipes, best report score first."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns(found), restval="", lineterminator="\n")
    table.writeheader()
    ranks = [None, *range(1, len(found.rows) + 1)]
    for rank, row in zip(ranks, (found.dense, *found.rows), strict=True):
        figures = _figures(found, row, rank if row.final else None)
        table.writerow({key: _written(item) for key, item in figures.items()})
    write_atomically(run / "leaderboard.csv", text.getvalue().encode())


def _written(item: object) -> object:
    if isinstance(item, float):
        return "" if math.isnan(item) else f"{item:.6g}"
    return item


def lines(found: Comparison) -> Iterator[str]:
    """Yield the leaderboard for a terminal; scores in percent, differences in points with their 95 % interval."""
    head = ["", "recipe", "score", "to the best", *found.corpora, "parameters", "seconds", "peak GiB"]
    table = [head, ["", *_cells(found.dense, found.corpora)]]
    table += [[str(i) if row.final else "-", *_cells(row, found.corpora)] for i, row in enumerate(found.rows, start=1)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    for cells in table:
        fitted = [c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        yield "  ".join(fitted).rstrip()
    for row in (found.dense, *found.rows):
        if row.final is None:
            yield f"{row.name}: {row.state}" + (f": {row.reason}" if row.reason else "")


def _cells(row: Row, corpora: Sequence[str]) -> list[str]:
    final, versus = row.final, row.versus_best
    if final is None:
        return [row.name, row.state, *[""] * (len(corpora) + 4)]
    score, stderr = row.score
    span = "" if versus is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*_points(versus))
    perplexities = [f"{final.perplexity[name]:.2f}" if name in final.perplexity else "" for name in corpora]
    cells = [row.name, f"{100 * score:.1f} ± {100 * stderr:.1f}", span, *perplexities, f"{final.parameters:,}"]
    return [*cells, f"{sum(final.seconds.values()):.1f}", f"{row.peak_bytes / 2**30:.2f}"]


def _points(found: Difference) -> tuple[float, float, float]:
    return 100 * found.mean, 100 * found.low, 100 * found.high


def require_scores(found: Comparison) -> None:
    """Return when at least one recipe has a score.

    Raises:
        NoTrialError: none has, with the reason of the first one.
    """
    if found.best is None:
        first = next((f"{row.name}: {row.reason}" for row in found.rows if row.reason), "no reason recorded")
        raise NoTrialError(f"none of {len(found.rows)} recipes could be scored; {first}")
