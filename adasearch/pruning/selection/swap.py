"""Swaps: the units of the highest scores, then exchanges with units that went while the output gets closer."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from adasearch.documents import Count, Positive, value
from adasearch.pruning.importance import GroupView
from adasearch.pruning.output_error import LeastSquaresError, PlainError
from adasearch.pruning.plan import highest
from adasearch.pruning.selection import partition_of
from adasearch.registry import SELECTION

_ROUNDING = 1e-9
"""Share of the error by which an exchange must lower it: less is rounding, and would go round in circles."""


@value
class SwapOptions:
    """Settings.

    Args:
        error: of the projection's output, kept columns set by ``least_squares`` or left as they are, ``plain``.
        damping: added to the diagonal of E[x x^T] as a multiple of its mean, for ``least_squares``.
        candidates: how many kept units that cost least alone, and how many removed ones that gain most, are paired.
        rounds: number of exchanges at most.
    """

    error: Literal["plain", "least_squares"] = "least_squares"
    damping: Positive = 0.01
    candidates: Count = 32
    rounds: Count = 32


@SELECTION.register(options=SwapOptions, needs=lambda _: frozenset({"covariance"}))
def choose(view: GroupView, scores: Tensor, width: int, options: SwapOptions) -> tuple[int, ...]:
    """Return what is left when the exchange that lowers the mean squared error most is made until none lowers it.

    In the manner of SoBP (EMNLP 2024), which refines a global first-order choice by local search; its formulas are not
    public. Units are exchanged within their partition only. The error never rises.
    """
    group, part = view.group, partition_of(view.group)
    state = PlainError(view) if options.error == "plain" else LeastSquaresError(view, options.damping)
    kept = set(highest(group, scores, width))
    state.move([unit for unit in range(group.units) if unit not in kept])
    for _ in range(options.rounds):
        moves = state.moves()
        back, away = (
            moves.masked_fill(state.out != out, math.inf).argsort(stable=True)[: min(options.candidates, count)]
            for out, count in ((True, group.units - len(kept)), (False, len(kept)))
        )
        changes = state.exchanges(back, away).masked_fill(part[back][:, None] != part[away], math.inf)
        row, column = divmod(int(changes.argmin()), len(away))
        if not float(changes[row, column]) < -_ROUNDING * abs(state.error):
            break
        state.move([int(back[row])])
        state.move([int(away[column])])
    return tuple((~state.out).nonzero().flatten().tolist())
