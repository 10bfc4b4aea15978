"""Rules for the residual stream: which of its dimensions stay. One file each.

An entry is ``score(context: HiddenContext, options) -> Tensor``: one number per dimension (D, higher = keep). Its
options have `remove`, the fraction of the dimensions that goes at most: never more than the budget asks for, and as
many stay as the family's heads divide. Its fact `needs` is a function ``options -> frozenset[str]``: the families of
`Statistics` that it reads; its fact `learns`, whether it trains, so that other weights than those of the base are cut;
`check`, where it has a rank, what is wrong with it, as of a recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adasearch.config import Component
from adasearch.errors import TrialError
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import HIDDEN


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HiddenContext:
    """What a rule may look at.

    Args:
        structure: of the dense model.
        weights: of the same, by full name.
        statistics: of the same, as far as the rule needs any.
        number: of dimensions that stay.
        train: trains the dense model to find them, given first scores (D), that number and the rule's options; returns
            the scores that came of it. Needed by rules that learn.
    """

    structure: ModelStructure
    weights: Mapping[str, Tensor]
    statistics: Statistics | None
    number: int = 0
    train: Callable[[Tensor, int, Any], Tensor] | None = None

    @property
    def known(self) -> Statistics:
        """Return the statistics, where the rule needs some."""
        assert self.statistics is not None, "this rule must be given statistics"
        return self.statistics

    @property
    def dimensions(self) -> int:
        """Return D, the size of the residual stream."""
        piece = self.structure.stream[0]
        return self.weights[piece.parameter].shape[piece.dim]


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that a rule with these options reads."""
    found: frozenset[str] = HIDDEN.get(component.type).facts["needs"](component.options)
    return found


def highest(scores: Tensor, number: int) -> tuple[int, ...]:
    """Return the `number` dimensions of the highest scores (D), ascending; of equal ones the first."""
    return tuple(sorted(scores.argsort(descending=True, stable=True)[:number].tolist()))


def kept(context: HiddenContext, component: Component, number: int) -> tuple[int, ...]:
    """Return the `number` dimensions of the highest scores, ascending; of equal ones the first.

    Raises:
        TrialError: a score is not finite (kind ``nan``).
    """
    scores: Tensor = HIDDEN.get(component.type).function(replace(context, number=number), component.options)
    assert scores.shape == (context.dimensions,), f"{component.type} gave scores of shape {tuple(scores.shape)}"
    if not bool(torch.isfinite(scores).all()):
        raise TrialError("nan", f"{component.type} scores of hidden dimensions must be finite", "outline")
    return highest(scores, number)
