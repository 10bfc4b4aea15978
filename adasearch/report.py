"""What a run found, from its records alone: ``leaderboard.csv`` and the facts that ``report.html`` shows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from adasearch.config import StudyConfig, TaskScore, TrialResult, mean_of
from adasearch.records import (
    DENSE,
    FinalRecord,
    Record,
    ranked_finals,
    read_finals,
    read_items,
    read_records,
    write_atomically,
)
from adasearch.report_parts import points, signed_points
from adasearch.search.outcomes import ending
from adasearch.sections import ObjectiveConfig
from adasearch.tradeoff import tradeoff
from adasearch.winner import ACCURACY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

COLUMNS = (
    "rank", "trial", "recipe", "search_score", "search_stderr", "report_score", "report_stderr", "retained",
    "parameters", "removed", "seconds", "state",
)  # fmt: skip
SPEEDS = ("file_bytes", "peak_bytes", "prefill_rate", "decode_rate", "prefill_gain", "decode_gain")
"""Columns of runs whose exports were measured: bytes, tokens per second, and these over the dense model's."""
RESAMPLES = 10_000
_GROUP = re.compile(r"\.(\d+)\.([^.]+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference of report scores: mean over tasks, and the ends of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def outcome(self) -> str:
        """Return what can be said: better or worse by so many percentage points, or that no difference is shown."""
        if not self.shown:
            return "no difference shown"
        return f"{'better' if self.mean > 0 else 'worse'} by {points(abs(self.mean))} points"

    @property
    def span(self) -> str:
        """Return the mean and its interval in percentage points."""
        ends = f"{signed_points(self.low)} to {signed_points(self.high)}"
        return f"{signed_points(self.mean)} points, 95 % interval {ends}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything a reader of a run is told.

    Args:
        records: one for each trial, the attempt that counts, by number; the dense model is not among them.
        finals: scored finalists, best first, see `winner.merits`.
        best: the first of `finals`, None before there is one.
        recipe: the best published recipe among the scored models.
        importance: share of each searched parameter, empty when it cannot be told.
        importance_note: why not, or how it was computed.
        ending: how the search ended, in one sentence; empty while it goes on.
        earlier: how far each run under `warm_start` was believed in the end, in words.
    """

    study: StudyConfig
    records: tuple[Record, ...]
    dense_record: Record | None
    dense: FinalRecord | None
    finals: tuple[FinalRecord, ...]
    best: FinalRecord | None
    recipe: FinalRecord | None
    versus_dense: Difference | None
    versus_recipe: Difference | None
    importance: Mapping[str, float]
    importance_note: str
    ending: str = ""
    earlier: tuple[str, ...] = ()


def report_score(score: TaskScore) -> tuple[float, float]:
    """Return the acc_norm of a task where it has one, else its acc, and its standard error."""
    return score.of("acc_norm")


def mean_score(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """Return the mean over tasks of `report_score`, and its standard error."""
    return mean_of(scores, "acc_norm")


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of each of `RESAMPLES` resamples of `values` (`n`-vector) with replacement."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 16:
        # Drawing n items is drawing how often each value comes: exact, and cheap for differences of 0 and 1.
        times: np.ndarray = rng.multinomial(len(values), counts / len(values), size=RESAMPLES)
        return np.asarray(times @ distinct / len(values))
    chunk = max(1, 2_000_000 // len(values))
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    draws = (values[rng.integers(0, len(values), (size, len(values)), dtype=np.int32)] for size in sizes)
    return np.concatenate([draw.mean(axis=1) for draw in draws])


def paired_difference(
    a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], seed: int
) -> tuple[float, float, float] | None:
    """Return the mean difference a - b over items, and the ends of its 95 % confidence interval.

    Every task weighs the same. The interval is the percentile bootstrap over items, resampled within each task
    (Efron & Tibshirani 1993, chapter 13), which keeps the pairing.

    Args:
        a: score per item by task.
        b: the same items in the same order.
        seed: of the resampling.

    Returns:
        mean, low, high; None when the two share no task with equally many items.
    """
    tasks = [t for t in a if t in b and len(a[t]) == len(b[t]) > 0]
    if not tasks:
        return None
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(a[t], dtype=np.float64) - np.asarray(b[t], dtype=np.float64) for t in tasks]
    means = np.mean([_resampled_means(gap, rng) for gap in gaps], axis=0)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean([gap.mean() for gap in gaps])), float(low), float(high)


def accuracies(run: Path, final: FinalRecord | None) -> dict[str, np.ndarray]:
    """Return a model's accuracy at each report item by task (n-vectors); empty where it was not scored."""
    items = read_items(run / "final" / final.name) if final else None
    return {key.removesuffix(ACCURACY): x for key, x in (items or {}).items() if key.endswith(ACCURACY)}


def difference(run: Path, a: FinalRecord | None, b: FinalRecord | None, seed: int) -> Difference | None:
    """Return the paired difference of two models' report scores, a - b; None where there is nothing to compare.

    Over the items of both, as `paired_difference` does it.
    """
    if a is None or b is None or a.name == b.name:
        return None
    found = paired_difference(accuracies(run, a), accuracies(run, b), seed)
    return Difference(mean=found[0], low=found[1], high=found[2]) if found else None


def _last_word(records: Iterable[Record]) -> dict[int, Record]:
    """Return the record that counts of each trial: its first result, or else its last failure."""
    chosen: dict[int, Record] = {}
    for record in records:
        known = chosen.get(record.number)
        if known is None or known.result is None:
            chosen[record.number] = record
    return chosen


def _importance(run: Path, finished: int) -> tuple[dict[str, float], str]:
    """Return how much each searched parameter explains, or why that cannot be told."""
    from adasearch.dashboard import FEW_TRIALS, parameter_importance

    if finished < FEW_TRIALS:
        return {}, f"Needs at least {FEW_TRIALS} scored trials, there are {finished}: raise `trials` and run again."
    found = parameter_importance(run)
    if not found:
        return (
            {},
            "The study database is missing or its trials do not differ enough; `adasearch rebuild` makes it again.",
        )
    note = "Share of what sets the best trials apart (PED-ANOVA on the trials of the study)."
    small = " With so few trials this is a hint at most." if finished < 4 * len(found) else ""
    return found, note + small


def _earlier(run: Path, study: StudyConfig) -> tuple[str, ...]:
    if not study.warm_start:
        return ()
    from adasearch.search.prior import weights_lines

    return tuple(weights_lines(run, study))


def gather(run: Path, study: StudyConfig) -> Findings:
    """Return what the records of a run say."""
    chosen = _last_word(read_records(run))
    dense_record = chosen.pop(DENSE, None)
    scored = read_finals(run)
    dense = next((f for f in scored if f.role == "dense"), None)
    finals = ranked_finals((f for f in scored if f.role == "finalist"), study.objective.metric)
    recipes = ranked_finals((f for f in scored if f.recipe), study.objective.metric)
    best, recipe = next(iter(finals), None), next(iter(recipes), None)
    finished = sum(r.result is not None for r in chosen.values())
    importance, note = _importance(run, finished)
    return Findings(
        study=study,
        records=tuple(chosen[number] for number in sorted(chosen)),
        dense_record=dense_record,
        dense=dense,
        finals=tuple(finals),
        best=best,
        recipe=recipe,
        versus_dense=difference(run, best, dense, study.seed),
        versus_recipe=difference(run, best, recipe, study.seed),
        importance=importance,
        importance_note=note,
        ending=ending(run, study, len(chosen)),
        earlier=_earlier(run, study),
    )


def state_of(record: Record) -> str:
    """Return ``complete``, ``stopped`` or ``failed``."""
    if record.result is None:
        return "failed"
    return "stopped" if record.result.stopped else "complete"


def _row(
    record: Record, final: FinalRecord | None, dense: FinalRecord | None, dense_parameters: float
) -> dict[str, object]:
    """Return the row of a model, without its rank."""
    result = record.result
    score, stderr = mean_score(final.report) if final else (math.nan, math.nan)
    whole = mean_score(dense.report)[0] if dense else math.nan
    parameters = result.parameters if result else None
    return {
        "trial": "dense" if record.number == DENSE else str(record.number),
        "recipe": record.recipe or "",
        "search_score": result.score if result else math.nan,
        "search_stderr": result.stderr if result else math.nan,
        "report_score": score,
        "report_stderr": stderr,
        "retained": score / whole if whole else math.nan,
        "parameters": parameters,
        "removed": 1 - parameters / dense_parameters if parameters else math.nan,
        "seconds": sum(result.seconds.values()) if result else math.nan,
        "state": "dense" if record.number == DENSE else state_of(record),
        **_cost_cells(result),
    }


def _cost_cells(result: TrialResult | None) -> dict[str, float]:
    """Return latency in seconds, memory in bytes, and each as a fraction of the dense model's."""
    if result is None:
        return {}
    figures = {cost: figure for cost, figure in result.costs.items() if cost != "parameters"}
    return {**figures, **{f"{cost}_share": result.shares[cost] for cost in figures}}


def _speed_cells(final: FinalRecord) -> dict[str, float]:
    """Return what an export of a model takes, the first one that was timed; {} where none was measured."""
    found = next((speed for speed in final.speeds if speed.prefill), next(iter(final.speeds), None))
    if found is None:
        return {}
    cells = {"file_bytes": float(found.file_bytes)}
    if found.prefill and found.decode:
        rates = found.prefill, found.decode
        figures = (float(found.peak_bytes), *(rate.own for rate in rates), *(rate.gain for rate in rates))
        cells |= dict(zip(SPEEDS[1:], figures, strict=True))
    return cells


def _dense_speed_cells(finals: Sequence[FinalRecord]) -> dict[str, float]:
    """Return what the dense model took beside the first export; {} where none was measured."""
    found = next((speed for final in finals for speed in final.speeds if speed.prefill and speed.decode), None)
    if found is None or found.prefill is None or found.decode is None:
        return {}
    figures = found.dense_file_bytes, found.dense_peak_bytes, found.prefill.dense, found.decode.dense, 1.0, 1.0
    return dict(zip(SPEEDS, map(float, figures), strict=True))


def dense_parameters_of(findings: Findings) -> float:
    """Return the parameter count of the dense model, nan where no record tells it."""
    if findings.dense is not None:
        return findings.dense.parameters
    record = findings.dense_record
    return record.result.parameters if record and record.result else math.nan


def ranked(findings: Findings) -> list[Record]:
    """Return the trials, best first: finalists by their merit, then by search score, stopped and failed last."""
    place = {f.trial: i for i, f in enumerate(findings.finals)}
    order = {"complete": 0, "stopped": 1, "failed": 2}

    def key(record: Record) -> tuple[float, ...]:
        score = record.result.score if record.result else 0.0
        return (place.get(record.number, len(place)), order[state_of(record)], -score, record.number)

    return sorted(findings.records, key=key)


def columns_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Return the columns of the leaderboard: `COLUMNS`, the costs that were measured, and who is on the front.

    `admitted` is whether a trial keeps the hard limits.
    """
    measured = [cost for cost in objective.costs if cost != "parameters"]
    own = [name for cost in measured for name in (cost, f"{cost}_share")]
    return (*COLUMNS, *own, *(["admitted"] if objective.at_most else []), *(["front"] if objective.several else []))


def _table(findings: Findings) -> pd.DataFrame:
    finals = {f.trial: f for f in (*findings.finals, *([findings.recipe] if findings.recipe else []))}
    whole = dense_parameters_of(findings)
    objective, dense = findings.study.objective, findings.dense_record
    found = tradeoff(objective, findings.records, dense.result if dense else None)
    members = found.numbers if found else ()
    rows = []
    if findings.dense_record is not None:
        cells = _row(findings.dense_record, findings.dense, findings.dense, whole)
        rows.append({"rank": None, **cells, **_dense_speed_cells(findings.finals)})
    for rank, record in enumerate(ranked(findings), start=1):
        counted = rank if record.result is not None else None
        final = finals.get(record.number)
        row = {"rank": counted, **_row(record, final, findings.dense, whole), **(_speed_cells(final) if final else {})}
        admitted = record.result is not None and objective.admits(record.result.shares)
        rows.append({**row, "admitted": admitted, "front": record.number in members})
    measured = SPEEDS if any(final.speeds for final in findings.finals) else ()
    table = pd.DataFrame(rows, columns=[*columns_of(objective), *measured])
    return table.astype({"rank": "Int64", "parameters": "Int64"})


def leaderboard(run: Path, study: StudyConfig) -> pd.DataFrame:
    """Return one row for the dense model and each trial, best first, and write it to ``leaderboard.csv``.

    Search scores are what the optimizer saw; report scores exist for finalists, the best recipe and the dense model.
    """
    return _write_table(run, gather(run, study))


def _write_table(run: Path, findings: Findings) -> pd.DataFrame:
    table = _table(findings)
    write_atomically(run / "leaderboard.csv", table.to_csv(index=False, float_format="%.6g").encode())
    return table


def report(run: Path, study: StudyConfig) -> Path:
    """Write ``report.html``, one file that needs nothing else, and return its path."""
    from adasearch.report_html import page

    return write_page(run, page(gather(run, study), run))


def write_page(run: Path, text: str) -> Path:
    """Write ``report.html`` and return its path."""
    path = run / "report.html"
    write_atomically(path, text.encode())
    return path


def write(run: Path, study: StudyConfig) -> Path:
    """Write ``leaderboard.csv`` and ``report.html`` of a run and return the path of the report."""
    return write_findings(run, gather(run, study))


def write_findings(run: Path, findings: Findings) -> Path:
    """Write both files from what `gather` found and return the path of the report."""
    from adasearch.report_html import page

    _write_table(run, findings)
    return write_page(run, page(findings, run))


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptWidths:
    """Fraction of units that a trial keeps, by kind (``attention``, ``mlp``) and layer; nan where nothing is cut."""

    trial: int
    label: str
    kept: dict[str, tuple[float, ...]]


def _units_key(record: Record) -> str:
    return str((record.config or {}).get("units", {}).get("attention", "kv_group"))


def kept_widths(findings: Findings, top: int) -> list[KeptWidths]:
    """Return the kept widths of the `top` best trials with a result, best first.

    Widths are relative to those of the dense model; for units other than its own, to the greatest that a trial kept.
    """
    full: dict[str, dict[str, int]] = {}
    dense = findings.dense_record
    for record in (*findings.records, *([dense] if dense else [])):
        limits = full.setdefault(_units_key(record), {})
        for name, width in (record.result.widths if record.result else {}).items():
            limits[name] = max(width, limits.get(name, 0))
    rows = [r for r in ranked(findings) if r.result is not None and r.result.widths][:top]
    return [_kept(record, full[_units_key(record)]) for record in rows]


def _kept(record: Record, full: Mapping[str, int]) -> KeptWidths:
    assert record.result is not None
    found: dict[str, dict[int, float]] = {}
    for name, width in record.result.widths.items():
        matched = _GROUP.search(name)
        if matched:
            kind = "mlp" if "mlp" in matched[2] else "attention"
            found.setdefault(kind, {})[int(matched[1])] = width / full[name]
    layers = 1 + max((max(by_layer) for by_layer in found.values()), default=-1)
    kept = {kind: tuple(by_layer.get(i, math.nan) for i in range(layers)) for kind, by_layer in found.items()}
    label = f"trial {record.number}" + (f" ({record.recipe})" if record.recipe else "")
    return KeptWidths(trial=record.number, label=label, kept=kept)
