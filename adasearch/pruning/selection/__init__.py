"""Unit selections: one file each. They say which units of a group stay, once its width is known.

An entry is ``choose(view: GroupView, scores: Tensor, width: int, options) -> tuple[int, ...]``: the units that stay,
ascending, `width` of each partition, where `scores` (U, higher = keep) are those of the importance criterion and
`width` is below the dense one. Its fact `needs` is a function ``options -> frozenset[str]``: the families of
`Statistics` read. A score judges units one by one; an entry may judge the set.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasearch.config import Component
from adasearch.pruning.importance import GroupView
from adasearch.pruning.plan import Choose
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import Group
from adasearch.registry import SELECTION


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that a selection with these options reads."""
    found: frozenset[str] = SELECTION.get(component.type).facts["needs"](component.options)
    return found


def select(view: GroupView, scores: Tensor, width: int, component: Component) -> tuple[int, ...]:
    """Return the units of one group that stay (ascending, `width` of each partition).

    Args:
        view: the group, its weights and statistics, and the trial's seed.
        scores: one number per unit (U), finite, higher stays.
        width: units kept per partition, from 1 to the dense width, at which all stay.
        component: which selection.

    Raises:
        TrialError: the statistics are none that a selection can be made from (kind ``nan``).
    """
    if width == view.group.width:
        return tuple(range(view.group.units))
    with torch.no_grad():
        kept: tuple[int, ...] = SELECTION.get(component.type).function(view, scores, width, component.options)
    return kept


def chooser(component: Component, weights: Mapping[str, Tensor], statistics: Statistics | None, seed: int) -> Choose:
    """Return `select` for the groups of one model, as `plan.make_plan` calls it.

    Args:
        component: which selection.
        weights: parameters of the model that is cut, by full name.
        statistics: of that model, at least what the selection needs; None where it needs nothing.
        seed: of the trial.
    """

    def choose(group: Group, scores: Tensor, width: int) -> tuple[int, ...]:
        view = GroupView(group=group, weights=weights, statistics=statistics, seed=seed)
        return select(view, scores, width, component)

    return choose


def partition_of(group: Group) -> Tensor:
    """Return the partition that each unit belongs to (U)."""
    return torch.arange(group.units) // group.width
