"""Evolutionary search over levels as an Optuna sampler: the move of EvoPress, DarwinLM and Tyr, trial by trial."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial

from adasearch.search.parameters import IntParameter, Parameter
from adasearch.search.sampler import TRIES, Past, SpaceSampler, View, derived_seed, value_of

MOST_SWAPS = 3
OTHERS = 0.2


def level_groups(parameters: Mapping[str, Parameter]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the levels that belong together: whole numbers of one range, numbered below one path.

    ``allocation.free_ratios.mlp.0``, ``....mlp.1`` and so on are a group, those of attention another.
    """
    groups: dict[tuple[str, IntParameter], list[str]] = {}
    for name, parameter in parameters.items():
        path, _, last = name.rpartition(".")
        if last.isdigit() and isinstance(parameter, IntParameter) and not parameter.log and parameter.size > 1:
            groups.setdefault((path, parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def swapped(
    params: Mapping[str, Any], names: tuple[str, ...], level: IntParameter, rng: np.random.Generator
) -> dict[str, Any]:
    """Return a point in which some of the levels `names` are a step higher and as many a step lower: their sum stays.

    The move of EvoPress (arXiv 2410.14649), DarwinLM and Tyr, 1 to 3 times: the lesser of two uniform draws, so that
    small moves are the commonest. Where no level can rise or none can fall, nothing moves.
    """
    result = dict(params)
    for _ in range(min(rng.integers(1, MOST_SWAPS + 1, size=2))):
        rising = [name for name in names if result[name] + level.step <= level.high]
        falling = [name for name in names if result[name] - level.step >= level.low]
        pairs = [(up, down) for up in rising for down in falling if up != down]
        if pairs:
            up, down = pairs[int(rng.integers(len(pairs)))]
            result[up] += level.step
            result[down] -= level.step
    return result


class EvolutionSampler(SpaceSampler):
    """Proposes mutations of the best trial told: (1 + lambda) evolution without waiting for a generation to fill.

    Levels that belong together are moved by `swapped`, so that what a group pays in all stays as it is; the other
    parameters change with probability 0.2, or always where no levels are active. A point that was told several times
    counts with the mean of its values.
    """

    def informed(self, study: Study, trial: FrozenTrial, view: View, past: Past) -> dict[str, Any]:
        """Return a mutation of the best trial that is not known, or any mutation where none was found."""
        del study, trial
        number, sign = past.turn
        parent = best_of(past.scored, view, sign)
        rng = np.random.default_rng(derived_seed(self._seed, number, "evolution"))
        groups = level_groups(view.encoding.parameters)
        child = parent
        for _ in range(TRIES):
            child = _mutated(parent, view, groups, rng)
            if view.key(child) not in past.known:
                return child
        return child


def best_of(scored: list[FrozenTrial], view: View, sign: float) -> dict[str, Any]:
    """Return the point of the best mean value, the earliest of equal ones; values grow better by `sign`."""
    values: dict[str, list[float]] = {}
    points: dict[str, dict[str, Any]] = {}
    for trial in scored:
        key = view.key(trial.params)
        values.setdefault(key, []).append(sign * value_of(trial))
        points.setdefault(key, trial.params)
    return points[max(values, key=lambda key: float(np.mean(values[key])))]


def _mutated(
    parent: dict[str, Any], view: View, groups: tuple[tuple[str, ...], ...], rng: np.random.Generator
) -> dict[str, Any]:
    parameters = view.encoding.parameters
    leveled = {name for names in groups for name in names}
    child = dict(parent)
    if not _active(groups, view.active(parent)) or rng.random() < OTHERS:
        child = view.encoding.mutated(parent, rng, [name for name in view.active(parent) if name not in leveled])
    for names in _active(groups, view.active(child)):
        level = parameters[names[0]]
        assert isinstance(level, IntParameter)
        child = swapped(child, names, level, rng)
    return child


def _active(groups: tuple[tuple[str, ...], ...], active: Collection[str]) -> list[tuple[str, ...]]:
    return [names for names in groups if names[0] in active]
