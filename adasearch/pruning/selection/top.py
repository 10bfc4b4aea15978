"""Top: the units of the highest scores stay."""

from __future__ import annotations

from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.pruning.plan import highest
from adasearch.registry import SELECTION, NoOptions


@SELECTION.register(needs=lambda _: frozenset())
def choose(view: GroupView, scores: Tensor, width: int, options: NoOptions) -> tuple[int, ...]:  # noqa: ARG001 - signature
    """Return the `width` units of each partition with the highest scores; of equal ones the first stay."""
    return highest(view.group, scores, width)
