"""The recorded trials of `benchmarks/recorded.py` as arrays, small enough to commit, and the way back.

Letters: N trials, K items of a role, S rungs or phases. Item values are rounded to half precision, the standard errors
of their means being hundreds of times as large; right or wrong takes a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

METRICS = ("margin", "acc_norm", "log_odds")
ROLES = ("search", "report")
PHASES = ("cut", "divergence", "recover_short", "midway", "recover_rest", "search", "report")

Line = Mapping[str, Any]
Point = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """Recorded trials, the same items in the same order for all of them.

    Args:
        points: N points of the grid.
        failed: points whose trial failed, with the reason; they are no rows of the arrays.
        tasks: by role the names of its tasks.
        of_task: by role, which of `tasks` each item belongs to (K); the items of a task lie together.
        values: by role and metric the item values (N x K).
        dense: by role and metric the item values of the dense model (K).
        seconds: by phase, processor seconds (N).
        divergence: nats per token right after the cut and their standard error (N x 2).
        midway: the same on the way of the recovery (N x 2).
        losses: of the recovery's steps (N x steps).
    """

    points: tuple[Point, ...]
    failed: tuple[tuple[Point, str], ...]
    tasks: dict[str, tuple[str, ...]]
    of_task: dict[str, np.ndarray]
    values: dict[str, dict[str, np.ndarray]]
    dense: dict[str, dict[str, np.ndarray]]
    seconds: dict[str, np.ndarray]
    divergence: np.ndarray
    midway: np.ndarray
    losses: np.ndarray

    def scores(self, role: str, metric: str) -> np.ndarray:
        """Return the mean over tasks of the mean over items of each trial (N)."""
        return task_mean(self.values[role][metric], self.of_task[role])


def task_mean(values: np.ndarray, of_task: np.ndarray) -> np.ndarray:
    """Return the mean over tasks of the mean over the items of each.

    Args:
        values: ... x K.
        of_task: which task each item belongs to (K).
    """
    return np.mean([values[..., of_task == task].mean(-1) for task in np.unique(of_task)], axis=0)


def task_error(values: np.ndarray, of_task: np.ndarray) -> np.ndarray:
    """Return the standard error of `task_mean`: sqrt(sum over tasks of s^2 / n) / number of tasks, s by n - 1.

    Args:
        values: ... x K, at least two items of each task.
        of_task: which task each item belongs to (K).
    """
    names = np.unique(of_task)
    parts = [values[..., of_task == task].var(-1, ddof=1) / (of_task == task).sum() for task in names]
    return np.sqrt(np.sum(parts, axis=0)) / len(names)


def lines_of(*paths: Path) -> list[dict[str, Any]]:
    """Return what files hold that are there, a line each; one that a killed process left unfinished does not count."""
    whole = [path.read_text(encoding="utf-8") for path in paths if path.exists()]
    lines = [line for text in whole for line in text.splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _joined(by_task: Mapping[str, Sequence[float]]) -> list[float]:
    return [item for values in by_task.values() for item in values]


def pack(lines: Sequence[Line]) -> Table:
    """Return the table that recorded lines make, in the order of their points.

    Raises:
        SystemExit: there is no dense model or no trial, or two lines are not about the same items.
    """
    dense = next((line for line in lines if line["point"] is None and line["failure"] is None), None)
    sound = [line for line in lines if line["point"] is not None and line["failure"] is None]
    if dense is None or not sound:
        raise SystemExit("packing needs the dense model and at least one trial without failure")
    sound.sort(key=lambda line: json.dumps(line["point"]))
    shapes = [_shape(line) for line in sound]
    if any(shape != shapes[0] for shape in shapes) or any(shapes[0][role] != _shape(dense)[role] for role in ROLES):
        raise SystemExit("the recorded trials are not about the same items: record them with one study")
    counts = {role: list(shapes[0][role].values()) for role in ROLES}
    return Table(
        points=tuple(line["point"] for line in sound),
        failed=tuple((line["point"], line["failure"]) for line in lines if line["point"] and line["failure"]),
        tasks={role: tuple(shapes[0][role]) for role in ROLES},
        of_task={role: np.repeat(np.arange(len(n), dtype=np.int8), n) for role, n in counts.items()},
        values={
            role: {m: np.array([_joined(line[role][m]) for line in sound]) for m in METRICS} for role in ROLES
        },
        dense={role: {m: np.array(_joined(dense[role][m])) for m in METRICS} for role in ROLES},
        seconds={phase: np.array([line["seconds"][phase] for line in sound]) for phase in PHASES},
        divergence=np.array([line["divergence"] for line in sound]),
        midway=np.array([line["midway"] for line in sound]),
        losses=np.array([line["losses"] for line in sound]),
    )  # fmt: skip


def _shape(line: Line) -> dict[str, dict[str, int]]:
    """Return the number of items by role and task."""
    return {role: {task: len(v) for task, v in line[role]["margin"].items()} for role in ROLES if role in line}


def save_table(table: Table, path: Path) -> None:
    """Write a table as a compressed ``.npz``; equal tables make equal files but for the time of writing."""
    arrays: dict[str, np.ndarray] = {
        "divergence": table.divergence.astype(np.float32),
        "midway": table.midway.astype(np.float32),
        "losses": table.losses.astype(np.float16),
        "seconds": np.stack([table.seconds[phase] for phase in PHASES]).astype(np.float32),
    }
    for role in ROLES:
        arrays[f"of_task/{role}"] = table.of_task[role].astype(np.int8)
        arrays |= {f"{role}/{m}": _small(m, table.values[role][m]) for m in METRICS}
    arrays |= {f"dense/{role}/{m}": _small(m, table.dense[role][m]) for role in ROLES for m in METRICS}
    head = json.dumps({"points": table.points, "failed": table.failed, "tasks": table.tasks, "phases": PHASES})
    np.savez_compressed(path, head=np.frombuffer(head.encode(), dtype=np.uint8), allow_pickle=False, **arrays)


def _small(metric: str, values: np.ndarray) -> np.ndarray:
    return values.astype(np.int8 if metric == "acc_norm" else np.float16)


def load_table(path: Path) -> Table:
    """Return the table that `save_table` wrote, or the one that a file of recorded lines (``.jsonl``) makes so far."""
    if path.suffix == ".jsonl":
        return pack(lines_of(path))
    with np.load(path, allow_pickle=False) as file:
        head = json.loads(file["head"].tobytes())
        wide = {name: file[name].astype(np.float64) for name in file.files if "/" in name or name in _FLOATS}
        of_task = {role: file[f"of_task/{role}"] for role in ROLES}
    return Table(
        points=tuple(head["points"]),
        failed=tuple((point, reason) for point, reason in head["failed"]),
        tasks={role: tuple(names) for role, names in head["tasks"].items()},
        of_task=of_task,
        values={role: {m: wide[f"{role}/{m}"] for m in METRICS} for role in ROLES},
        dense={role: {m: wide[f"dense/{role}/{m}"] for m in METRICS} for role in ROLES},
        seconds=dict(zip(head["phases"], wide["seconds"], strict=True)),
        divergence=wide["divergence"],
        midway=wide["midway"],
        losses=wide["losses"],
    )


_FLOATS = frozenset({"divergence", "midway", "losses", "seconds"})
