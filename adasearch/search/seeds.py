"""Seeds: the recipes that a search runs first, because its space holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from adasearch.config import StudyConfig, merged
from adasearch.documents import value
from adasearch.search.outcomes import Recipe
from adasearch.search.space import Space

_EXAMPLES = 3


@value
class Seeds:
    """What becomes of the recipes of a study.

    Args:
        recipes: those that a search runs first, in this order.
        same: the earlier recipe that is the same trial, by the name of the later one.
        waiting: points of the space for which there is no room.
        unexpressed: why the space cannot express a recipe, by its name.
    """

    recipes: tuple[Recipe, ...]
    same: dict[str, str]
    waiting: tuple[str, ...]
    unexpressed: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the recipes that run."""
        return tuple(recipe.name for recipe in self.recipes)

    def lines(self) -> Iterator[str]:
        """Yield what is said of recipes that were named and do not run."""
        for name, reason in self.unexpressed.items():
            yield f"recipe {name} is not in the space and is left out: {reason}"
        for name, first in self.same.items():
            yield f"recipe {name} is the same trial as recipe {first} and is left out"

    def summary(self) -> str:
        """Return in one line what becomes of recipes that were not named: counts, and a few of those left out."""
        held = len(self.recipes) + len(self.waiting) + len(self.same)
        parts = [f"{held} of {held + len(self.unexpressed)} recipes are points of the space"]
        if self.same:
            parts.append("the same trials as others: " + _some([f"{a} ({b})" for a, b in self.same.items()]))
        if self.waiting:
            parts.append(f"left out, as seeds take at most half of the trials: {_some(self.waiting)}")
        if self.unexpressed:
            parts.append("not expressible: " + _some([f"{name} ({why})" for name, why in self.unexpressed.items()]))
        return "; ".join(parts)


def _some(texts: list[str] | tuple[str, ...]) -> str:
    more = len(texts) - _EXAMPLES
    return ", ".join(texts[:_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def find_seeds(study: StudyConfig, space: Space) -> Seeds:
    """Return which recipes of a study its search runs first, each trial once.

    Recipes that the study names fill as many trials as there are; where it leaves them open, they take at most half.
    """
    found: dict[str, Recipe] = {}
    same: dict[str, str] = {}
    unexpressed: dict[str, str] = {}
    for name, recipe in study.recipes.items():
        config = _at_studys_budget(study, space, merged(study.trial, recipe))
        params = space.encode(config)
        if params is None:
            unexpressed[name] = space.obstacle(config)
            continue
        first = found.setdefault(space.decode(params).key, Recipe(name=name, params=params)).name
        if first != name:
            same[name] = first
    room = study.trials // 2 if study.all_recipes else study.trials
    points = tuple(found.values())
    waiting = tuple(recipe.name for recipe in points[room:])
    return Seeds(recipes=points[:room], same=same, waiting=waiting, unexpressed=unexpressed)


def _at_studys_budget(study: StudyConfig, space: Space, config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with the study's budget, where it says nothing of one and that budget is a point of the space."""
    if "budget" in config or not any(path.startswith("budget.") for path in study.space.dimensions):
        return config
    placed = {**config, "budget": {"remove": study.budget.remove}}
    return config if space.encode(placed) is None else placed


def decided(study: StudyConfig, space: Space) -> StudyConfig:
    """Return the study with the recipes named that it leaves open: those that its search runs first."""
    if not study.all_recipes:
        return study
    names = find_seeds(study, space).names
    return dataclasses.replace(study, recipes={name: study.recipes[name] for name in names}, all_recipes=False)
