"""Search parameters and their features: what the optimizer sees of a point. Pure, and without any optimizer.

Legend: P parameters, d feature columns. A unit coordinate lies in [0, 1]; equal steps of it are equal steps of the
parameter, or of its logarithm where `log` is set.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from adasearch.documents import value

Scalar = str | int | float | bool | None


@value
class FloatParameter:
    """A real number in [low, high]; only ``low + k step`` where `step` is given."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def to_unit(self, item: float) -> float:
        """Return the unit coordinate of `item`; a number outside of the range counts as the nearer end."""
        item = min(max(float(item), self.low), self.high)
        if self.low == self.high:
            return 0.5
        if self.step is not None:
            return (round((item - self.low) / self.step) + 0.5) / self._num_steps
        if self.log:
            return math.log(item / self.low) / math.log(self.high / self.low)
        return (item - self.low) / (self.high - self.low)

    def from_unit(self, unit: float) -> float:
        """Return the number at a unit coordinate."""
        unit = min(max(float(unit), 0.0), 1.0)
        if self.step is not None:
            return float(min(self.low + self.step * min(int(unit * self._num_steps), self._num_steps - 1), self.high))
        if self.log:
            item = self.low * math.exp(unit * math.log(self.high / self.low))
        else:
            item = self.low + unit * (self.high - self.low)
        return float(min(max(item, self.low), self.high))

    @property
    def _num_steps(self) -> int:
        assert self.step is not None
        return math.floor((self.high - self.low) / self.step + 1e-9) + 1

    @property
    def size(self) -> float:
        """Return how many values there are, infinity where there is no step."""
        if self.low == self.high:
            return 1
        return math.inf if self.step is None else self._num_steps

    def values(self) -> tuple[float, ...]:
        """Return every value, of a number that has finitely many."""
        return tuple(self.from_unit((i + 0.5) / self.size) for i in range(int(self.size)))


@value
class IntParameter:
    """A whole number in [low, high]; only ``low + k step`` where `step` is not 1."""

    low: int
    high: int
    log: bool = False
    step: int = 1

    def to_unit(self, item: float) -> float:
        """Return the unit coordinate of `item`: the middle of the stretch that `from_unit` rounds to it."""
        item = min(max(int(item), self.low), self.high)
        if self.low == self.high:
            return 0.5
        if self.log:
            return (math.log(item) - self._ends[0]) / (self._ends[1] - self._ends[0])
        return ((item - self.low) // self.step + 0.5) / self._num_steps

    def from_unit(self, unit: float) -> int:
        """Return the number at a unit coordinate; without `log`, each has a stretch of equal length."""
        unit = min(max(float(unit), 0.0), 1.0)
        if self.log:
            item = round(math.exp(self._ends[0] + unit * (self._ends[1] - self._ends[0])))
            return min(max(item, self.low), self.high)
        return self.low + self.step * min(int(unit * self._num_steps), self._num_steps - 1)

    @property
    def _ends(self) -> tuple[float, float]:
        return math.log(self.low - 0.5), math.log(self.high + 0.5)

    @property
    def _num_steps(self) -> int:
        return (self.high - self.low) // self.step + 1

    @property
    def size(self) -> int:
        """Return how many values there are."""
        return self._num_steps

    def values(self) -> tuple[int, ...]:
        """Return every value."""
        return tuple(range(self.low, self.high + 1, self.step))


@value
class CategoricalParameter:
    """One of `choices`, which have no order."""

    choices: tuple[Scalar, ...]

    def from_unit(self, unit: float) -> Scalar:
        """Return the choice in whose stretch of [0, 1] the coordinate lies."""
        return self.choices[min(max(int(unit * len(self.choices)), 0), len(self.choices) - 1)]

    @property
    def size(self) -> int:
        """Return how many values there are."""
        return len(self.choices)

    def values(self) -> tuple[Scalar, ...]:
        """Return every value."""
        return self.choices

    @property
    def num_columns(self) -> int:
        """Return the feature columns: one per choice, but a single one for two choices."""
        return len(self.choices) if len(self.choices) > 2 else 1


Parameter = FloatParameter | IntParameter | CategoricalParameter


class Encoding:
    """Maps points of P parameters to vectors of d features in [0, 1] and back.

    A number is one column: its unit coordinate. A choice is one column for each of its values, holding 0 or
    1/sqrt(2), so that two different values lie at distance 1; a choice of two is one column of 0 or 1. What is
    inactive in a point, or missing from it, has its numbers in the middle and its choices at zero: points that differ
    only there have equal features.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)
        self._columns: dict[str, slice] = {}
        start = 0
        for name, parameter in self.parameters.items():
            stop = start + (parameter.num_columns if isinstance(parameter, CategoricalParameter) else 1)
            self._columns[name] = slice(start, stop)
            start = stop
        self.num_columns = start

    @property
    def groups(self) -> np.ndarray:
        """Return for each column the index of its parameter (d integers)."""
        widths = [columns.stop - columns.start for columns in self._columns.values()]
        return np.repeat(np.arange(len(widths)), widths)

    def features(self, params: Mapping[str, Any], active: Collection[str]) -> np.ndarray:
        """Return the features (d float64) of a point of which the parameters `active` have an effect."""
        row = np.zeros(self.num_columns)
        for name, parameter in self.parameters.items():
            present = name in active and name in params
            if isinstance(parameter, CategoricalParameter):
                if present and params[name] in parameter.choices:
                    row[self._columns[name]] = _one_hot(parameter, parameter.choices.index(params[name]))
            else:
                row[self._columns[name]] = parameter.to_unit(params[name]) if present else 0.5
        return row

    def free(self, active: Collection[str]) -> np.ndarray:
        """Return which columns (d bool) hold active numbers: those that may be moved continuously."""
        mask = np.zeros(self.num_columns, dtype=bool)
        for name, parameter in self.parameters.items():
            if name in active and parameter.size > 1 and not isinstance(parameter, CategoricalParameter):
                mask[self._columns[name]] = True
        return mask

    def moved(self, params: Mapping[str, Any], active: Collection[str], features: np.ndarray) -> dict[str, Any]:
        """Return `params` with its active numbers read off `features` (d), rounded to what they may be."""
        result = dict(params)
        for name, parameter in self.parameters.items():
            if name in active and not isinstance(parameter, CategoricalParameter):
                result[name] = parameter.from_unit(features[self._columns[name]][0])
        return result

    def from_units(self, units: np.ndarray) -> dict[str, Any]:
        """Return the point at P unit coordinates, one for each parameter."""
        return {name: p.from_unit(u) for (name, p), u in zip(self.parameters.items(), units, strict=True)}

    def mutated(
        self, params: Mapping[str, Any], rng: np.random.Generator, among: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Return a neighbour of a point: one to three parameters changed, numbers by a step of a random size.

        Args:
            params: the point.
            rng: of all draws.
            among: names of the parameters that may change, None for all.
        """
        result = {name: params.get(name, p.from_unit(0.5)) for name, p in self.parameters.items()}
        names = [name for name, p in self.parameters.items() if p.size > 1 and (among is None or name in among)]
        number = int(rng.integers(1, 4))
        for name in rng.choice(names, size=min(len(names), number), replace=False) if names else ():
            parameter = self.parameters[name]
            unit = float(rng.random())
            if not isinstance(parameter, CategoricalParameter) and rng.random() < 0.8:
                scale = float(rng.choice([0.03, 0.1, 0.3]))
                unit = parameter.to_unit(result[name]) + scale * float(rng.standard_normal())
            result[name] = parameter.from_unit(unit)
        return result


def _one_hot(parameter: CategoricalParameter, index: int) -> np.ndarray:
    if len(parameter.choices) <= 2:
        return np.array([float(index)])
    row = np.zeros(len(parameter.choices))
    row[index] = 1 / math.sqrt(2)
    return row
