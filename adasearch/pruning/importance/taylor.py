"""Taylor: the change of the loss that removing a unit's weights is expected to make."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from adasearch.documents import value
from adasearch.pruning.importance import GroupView, Probe
from adasearch.pruning.reduction import Across, across
from adasearch.registry import IMPORTANCE


@value
class TaylorOptions:
    """Settings.

    Args:
        grain: ``element`` sums absolute values over a row's weights, ``vector`` takes the absolute value of the sum.
        order: ``first`` W g, ``second`` W^2 F, ``mix`` W g - W^2 F / 2; g is the gradient, F the Fisher diagonal.
        reduce: how the scores of the matrices that a unit owns parts of become one, in the order of the slices.
        probe: ``all`` of those matrices, or the ``output`` projection alone.
    """

    grain: Literal["element", "vector"] = "element"
    order: Literal["first", "second", "mix"] = "first"
    reduce: Across = "sum"
    probe: Probe = "all"


def _needs(options: TaylorOptions) -> frozenset[str]:
    return frozenset({"gradient" if options.order == "first" else "fisher"})


def _row_scores(view: GroupView, name: str, options: TaylorOptions) -> Tensor:
    """Return the score of each row of a matrix (U × rows per unit)."""
    if options.order == "first":
        kind = "elem1" if options.grain == "element" else "signed"
        return view.statistic("gradient", name, kind).abs()
    second = view.statistic("fisher", name, "elem2")
    if options.order == "second":
        return second  # every W^2 F is >= 0, so both grains are the same
    if options.grain == "element":
        return view.statistic("fisher", name, "mix")
    return (view.statistic("fisher", name, "signed") - second / 2).abs()


@IMPORTANCE.register(options=TaylorOptions, needs=_needs)
def score(view: GroupView, options: TaylorOptions) -> Tensor:
    """Return the expected change of the loss per unit (U): LLM-Pruner's criteria (arXiv 2305.11627).

    Rows are summed within a unit before matrices are reduced: the matrices of a KV group have different numbers of
    rows. For `sum`, `mean`, `first` and `last` the order makes no difference.
    """
    parts = [_row_scores(view, name, options).sum(1) for name in view.members(options.probe)]
    return across(parts, options.reduce)
