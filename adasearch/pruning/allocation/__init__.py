"""Allocations: one file each.

An entry is ``shape(context: AllocationContext, options) -> dict[str, float]``: the relative pruning ratio (fraction of
units removed, >= 0, free of scale) of each group by name. `projection.project` scales it onto the budget; a group of
ratio 0 stays dense. Its fact `needs` is a function ``options -> frozenset[str]``: the families of `Statistics` read.
A fact `equal_widths` (options -> bool), where there is one, says whether all layers shall end equally wide. A fact
`layers` (options -> dict[str, int]) says which settings hold a value for each layer of the dense model, and how many.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from adasearch.config import Component
from adasearch.documents import join
from adasearch.errors import ConfigError
from adasearch.pruning.projection import removal
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import ALLOCATION
from adasearch.sections import BudgetConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocationContext:
    """What an allocator may look at.

    Args:
        structure: the groups.
        budget: what must go; the projection meets it whatever the allocator returns.
        scores: importance of each unit (U, higher = keep) by group name.
        statistics: holds at least what the allocator needs; None where it needs nothing.
        weights: parameters of the dense model by full name.
        biases: output projections (module names) that compensation will give a bias.
    """

    structure: ModelStructure
    budget: BudgetConfig
    scores: Mapping[str, Tensor]
    statistics: Statistics | None
    weights: Mapping[str, Tensor]
    biases: Collection[str] = ()

    @property
    def known(self) -> Statistics:
        """Return the statistics, where the allocator needs some."""
        assert self.statistics is not None, "this allocation must be given statistics"
        return self.statistics

    @property
    def share(self) -> float:
        """Return the fraction of the parameters of all groups that must go, between 0 and 1."""
        total = sum(g.width * g.step_cost for g in self.structure.groups)
        return min(1.0, max(0, removal(self.structure, self.budget, self.biases)) / total)

    @property
    def layer_paths(self) -> dict[int, str]:
        """Return the module path of each layer that has groups, by its index."""
        return {group.layer: group.name.rpartition(".")[0] for group in self.structure.groups}

    def cosines(self) -> dict[int, float]:
        """Return the mean cosine between the residual stream before and after each layer (family ``cosine``)."""
        return {layer: self.known.cosine(path) for layer, path in self.layer_paths.items()}

    def spread(self, ratios: Mapping[int, float]) -> dict[str, float]:
        """Return the ratio of each group, by name, that follows from those of the layers, by index."""
        return {group.name: ratios[group.layer] for group in self.structure.groups}


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that an allocator with these options reads."""
    found: frozenset[str] = ALLOCATION.get(component.type).facts["needs"](component.options)
    return found


def aimed(budget: BudgetConfig, component: Component) -> BudgetConfig:
    """Return the budget to project onto: with uniform widths also where the allocator asks for them."""
    entry = ALLOCATION.get(component.type)
    equal = "equal_widths" in entry.facts and entry.facts["equal_widths"](component.options)
    return dataclasses.replace(budget, uniform=True) if equal else budget


def check(component: Component, layers: int, where: str) -> None:
    """Make sure that what an allocator is told of each layer suits a model of so many `layers`.

    Raises:
        ConfigError: a setting holds more or fewer values; names its key below `where`.
    """
    facts = ALLOCATION.get(component.type).facts
    for name, count in facts["layers"](component.options).items() if "layers" in facts else ():
        if count != layers:
            problem = f"must hold one ratio for each of the model's {layers} layers, given {count}"
            raise ConfigError(join(where, name), problem)


def shape(context: AllocationContext, component: Component) -> dict[str, float]:
    """Return the relative pruning ratio of every group by name, as the allocator called `component.type` sees it.

    Raises:
        ConfigError: the options leave too little to prune in this model, or are made for another number of layers.
    """
    check(component, context.structure.dense.layers, f"allocation.{component.type}")
    ratios: dict[str, float] = ALLOCATION.get(component.type).function(context, component.options)
    names = {group.name for group in context.structure.groups}
    assert set(ratios) == names, f"{component.type} must give each group a ratio"
    assert all(math.isfinite(r) and r >= 0 for r in ratios.values()), f"{component.type} gave {ratios}"
    return ratios
