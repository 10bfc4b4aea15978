"""Sigmoid of distances: the further a layer moves the residual stream, the more of it stays."""

from __future__ import annotations

import math
from typing import Literal

from adasearch.documents import NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class CosineSigmoidOptions:
    """Settings.

    Args:
        a: slope of the sigmoid over the mean distance of a layer. CFSP has the slope 1 over 1e-4 times the distance
            summed over its 128 x 1024 calibration tokens, which is 13.1 over the mean.
        distance: ``angular`` arccos(c) / pi of the mean cosine c (CFSP takes the mean of the angles, which differs
            where the tokens of a layer do), or ``cosine`` 1 - c.
    """

    a: NonNegative = 13.1072
    distance: Literal["angular", "cosine"] = "angular"


_ROOM = 1.05
"""By how much CFSP stays away from a layer that loses nothing."""


def _distance(cosine: float, kind: str) -> float:
    # A mean of cosines computed in float32 may exceed 1 by a rounding error.
    return 1 - cosine if kind == "cosine" else math.acos(max(-1.0, min(1.0, cosine))) / math.pi


def _sigmoid(x: float) -> float:
    # The form for each sign in which exp cannot overflow.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


@ALLOCATION.register(options=CosineSigmoidOptions, needs=lambda _: frozenset({"cosine"}))
def shape(context: AllocationContext, options: CosineSigmoidOptions) -> dict[str, float]:
    """Return 1 - kept q_l / mean(q), where q_l = sigmoid(a (B_l - mean B)) and B_l is the distance of layer l.

    `kept` is the fraction of the groups' parameters that the budget leaves. Where a layer would keep more than it has,
    all q are drawn towards their mean until the most it keeps is kept + (1 - kept) / 1.05: CFSP (arXiv 2409.13199), its
    released code.
    """
    distances = {layer: _distance(c, options.distance) for layer, c in context.cosines().items()}
    middle = sum(distances.values()) / len(distances)
    scores = {layer: _sigmoid(options.a * (d - middle)) for layer, d in distances.items()}
    mean, most, kept = sum(scores.values()) / len(scores), max(scores.values()), 1 - context.share
    pull = (mean / kept - mean) / (most - mean) / _ROOM if kept * most >= mean else 1.0
    return context.spread({layer: 1 - kept * (1 + pull * (q - mean) / mean) for layer, q in scores.items()})
