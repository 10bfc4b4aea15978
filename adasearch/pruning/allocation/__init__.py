"""Allocations: one file each.

An entry is ``shape(context: AllocationContext, options) -> dict[str, float]``: the relative pruning ratio (fraction of
units removed, >= 0, free of scale) of each group by name. `projection.project` scales it onto the budget; a group of
ratio 0 stays dense. Its fact `needs` is a function ``options -> frozenset[str]``: the families of `Statistics` read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from adasearch.config import BudgetConfig, Component
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import ALLOCATION


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AllocationContext:
    """What an allocator may look at.

    Args:
        structure: the groups.
        budget: what must go; the projection meets it whatever the allocator returns.
        scores: importance of each unit (U, higher = keep) by group name.
        statistics: holds at least what the allocator needs; None where it needs nothing.
        biases: output projections (module names) that compensation will give a bias.
    """

    structure: ModelStructure
    budget: BudgetConfig
    scores: Mapping[str, Tensor]
    statistics: Statistics | None
    biases: Collection[str] = ()


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that an allocator with these options reads."""
    found: frozenset[str] = ALLOCATION.get(component.type).facts["needs"](component.options)
    return found


def shape(context: AllocationContext, component: Component) -> dict[str, float]:
    """Return the relative pruning ratio of every group by name, as the allocator called `component.type` sees it.

    Raises:
        ConfigError: the options leave too little to prune in this model.
    """
    ratios: dict[str, float] = ALLOCATION.get(component.type).function(context, component.options)
    names = {group.name for group in context.structure.groups}
    assert set(ratios) == names, f"{component.type} must give each group a ratio"
    assert all(math.isfinite(r) and r >= 0 for r in ratios.values()), f"{component.type} gave {ratios}"
    return ratios
