"""Mix: a weighted mean of two criteria."""

from __future__ import annotations

from torch import Tensor

from adasearch.config import Component
from adasearch.documents import Share, value
from adasearch.pruning.importance import Criterion, GroupView, needs, score_by
from adasearch.pruning.importance.taylor import TaylorOptions
from adasearch.pruning.reduction import Normalise, normalised
from adasearch.registry import IMPORTANCE


@value
class MixOptions:
    """Settings.

    Args:
        first: a criterion.
        second: another.
        share: weight of the second; the first has the rest.
        normalise: of each criterion's scores within a group, so that they can be added.
    """

    first: Criterion = Component(type="taylor", options=TaylorOptions(grain="element"))
    second: Criterion = Component(type="taylor", options=TaylorOptions(grain="vector"))
    share: Share = 0.5
    normalise: Normalise = "mean"


@IMPORTANCE.register(options=MixOptions, needs=lambda options: needs(options.first) | needs(options.second))
def score(view: GroupView, options: MixOptions) -> Tensor:
    """Return (1 - share) N(first) + share N(second) with N the normalisation (U).

    Over the share it spans the fusions of fine and coarse scores of HyWIA (arXiv 2403.10799) and SAAP (arXiv
    2412.15127), which learn or derive the weights; here they are the same for every layer.
    """
    first, second = (normalised(score_by(part, view), options.normalise) for part in (options.first, options.second))
    return first.lerp(second, options.share)
