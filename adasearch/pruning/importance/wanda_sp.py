"""Wanda-SP: Wanda's weight times activation norm, summed over the columns of the output projection."""

from __future__ import annotations

from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE, NoOptions


@IMPORTANCE.register(needs=lambda _: frozenset({"moments"}))
def score(view: GroupView, options: NoOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return the sum over the unit's features j of sqrt(E[x_j^2]) * ||W_:,j||_1 (U).

    This is Wanda (arXiv 2306.11695) by column, as FLAP's authors (arXiv 2312.11983) define Wanda-SP; their mean over
    output features differs by a constant.
    """
    root = view.feature(view.moments().second_moment).sqrt()
    return (root * view.output_weight().double().abs().sum(2)).sum(1)
