"""The recorded trials as a problem: what is asked for is answered with a trial that was run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adasearch.search.parameters import CategoricalParameter, FloatParameter
from benchmarks import recorded
from benchmarks.problems import Outcome, Params, Phase, Problem, drawn, scored
from benchmarks.table import Table, load_table, task_error, task_mean

PLAIN = {"grain": "element", "compensation": "none", "tilt": 0.0, "attention": 0.0}


def _grid(values: tuple[float, ...]) -> FloatParameter:
    return FloatParameter(low=values[0], high=values[-1], step=values[1] - values[0])


class Replayed(Problem):
    """A table as a problem. Each seed scores trials on items of its own, drawn with repetition from the recorded ones.

    A point that was not recorded, in a table that is not complete or whose trial failed, is answered with the nearest.

    Args:
        table: recorded trials.
        metric: of the objective.
        held: metric of the held-out value, on report items.
    """

    fresh = False

    def __init__(self, table: Table, metric: str = "margin", held: str | None = None) -> None:
        super().__init__(
            f"table_{metric}",
            {
                "importance": CategoricalParameter(choices=recorded.IMPORTANCE),
                "grain": CategoricalParameter(choices=recorded.GRAIN),
                "compensation": CategoricalParameter(choices=recorded.COMPENSATION),
                "tilt": _grid(recorded.TILT),
                "attention": _grid(recorded.ATTENTION),
            },
            {"grain": ("importance", ("taylor",))},
            {kind: {"importance": kind, **PLAIN} for kind in recorded.IMPORTANCE},
        )
        self.table, self.metric = table, metric
        self._held = table.scores("report", held or metric)
        self._rows = {self.point_key(point): row for row, point in enumerate(table.points)}
        self._features = np.array([self.features(point) for point in table.points])

    def row(self, params: Params) -> int:
        """Return the row of a point, that of the nearest recorded one where it is not there."""
        row = self._rows.get(self.point_key(params))
        if row is None:
            row = int(np.abs(self._features - self.features(params)).sum(1).argmin())
        return row

    def held_out(self, params: Params) -> float:
        """Return the mean over the report items."""
        return float(self._held[self.row(params)])

    @functools.cached_property
    def scale(self) -> tuple[float, float]:
        """Return the held-out values of the median trial and of the best one."""
        return float(np.median(self._held)), float(self._held.max())

    def _chosen(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the items of a seed and their tasks (K), those of the tasks in turn."""
        of_task = self.table.of_task["search"]
        rng = drawn(self.name, seed, "items")
        draws = [rng.choice(np.flatnonzero(of_task == task), size=int((of_task == task).sum()))
                 for task in np.unique(of_task)]  # fmt: skip
        place = np.concatenate([(np.arange(len(d)) + 0.5) / len(d) for d in draws])
        order = np.argsort(place, kind="stable")
        rows = np.concatenate(draws)[order]
        return rows, of_task[rows]

    def evaluate(self, params: Params, seed: int) -> Outcome:
        """Return the trial at a point, on the items of a seed."""
        row = self.row(params)
        chosen, of_task = self._chosen(seed)
        items = self.table.values["search"][self.metric][row, chosen]
        seconds: Mapping[str, Any] = {phase: float(values[row]) for phase, values in self.table.seconds.items()}

        def look(name: str, values: np.ndarray) -> Phase:
            return Phase(name=name, seconds=seconds[name], merit=-float(values[row, 0]), extra=True)

        return Outcome(
            score=float(task_mean(items, of_task)),
            stderr=float(task_error(items, of_task)),
            phases=(
                Phase(name="cut", seconds=seconds["cut"]), look("divergence", self.table.divergence),
                Phase(name="recover_short", seconds=seconds["recover_short"]), look("midway", self.table.midway),
                Phase(name="recover_rest", seconds=seconds["recover_rest"]),
                *scored(items, of_task, seconds["search"]),
            ),
            items=items,
            of_task=of_task,
        )  # fmt: skip


@functools.lru_cache(maxsize=1)
def table_of(path: Path) -> Table:
    """Return a table, read once."""
    return load_table(path)
