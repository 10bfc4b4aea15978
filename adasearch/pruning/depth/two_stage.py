"""Two stages: so many attention sublayers go as the sizes of the blocks say, greedily; MLP widths pay the rest."""

from __future__ import annotations

import math

from adasearch.documents import Positive, value
from adasearch.pruning.depth import DepthContext, LossOptions, paths_of
from adasearch.pruning.depth._greedy import greedy
from adasearch.registry import DEPTH


@value
class TwoStageOptions(LossOptions):
    """Settings.

    Args:
        alpha: the larger, the more attention goes; 2SSP takes 1.5.
    """

    alpha: Positive = 1.5


def attention_count(context: DepthContext, alpha: float) -> int:
    """Return how many attention sublayers 2SSP removes: round(L s^((M / A) / alpha)), before the room is looked at.

    L is the number of layers, s the fraction of their parameters that goes, M and A the parameters of an MLP and of an
    attention, here with their norms (arXiv 2501.17771).
    """
    mlp, attention = (context.cost(paths_of(context.items(unit))) for unit in ("mlp", "attention"))
    share = min(1.0, context.share_removed)
    return round(context.layers * math.pow(share, mlp / attention / alpha))


@DEPTH.register(options=TwoStageOptions, needs=lambda _: frozenset(), uses_loss=True)
def choose(context: DepthContext, options: TwoStageOptions) -> tuple[str, ...]:
    """Return the attention sublayers that go, always the one without which the loss is lowest (2SSP, stage 2)."""
    limit = attention_count(context, options.alpha)
    return paths_of(greedy(context, context.items("attention"), limit))
