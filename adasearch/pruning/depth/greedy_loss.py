"""Greedy loss: again and again, what the model misses least on calibration tokens goes."""

from __future__ import annotations

from adasearch.documents import Index, value
from adasearch.pruning.depth import DepthContext, LossOptions, Unit, paths_of
from adasearch.pruning.depth._greedy import greedy, losses
from adasearch.registry import DEPTH


@value
class GreedyLossOptions(LossOptions):
    """Settings.

    Args:
        unit: what goes at once: ``layer`` as in SLEB, ``sublayer`` as in BlockPruner, ``attention`` as in 2SSP, or
            ``mlp``.
        again: whether losses are taken again after each removal; otherwise those of single removals from the dense
            model decide about all, as in Shortened LLaMA.
        protect_first: number of layers at the bottom that stay.
        protect_last: number of layers at the top that stay.
    """

    unit: Unit = "layer"
    again: bool = True
    protect_first: Index = 0
    protect_last: Index = 0


@DEPTH.register(options=GreedyLossOptions, needs=lambda _: frozenset(), uses_loss=True)
def choose(context: DepthContext, options: GreedyLossOptions) -> tuple[str, ...]:
    """Return the items that go, as many as fit: each the one without which the loss is lowest.

    SLEB (arXiv 2402.09025) removes layers so, BlockPruner (arXiv 2406.10594) sublayers;
    Shortened LLaMA (arXiv 2402.02834) ranks layers once by the perplexity without each.
    """
    items = context.items(options.unit, options.protect_first, options.protect_last)
    if options.again:
        return paths_of(greedy(context, items))
    found = losses(context, frozenset(), [item for item in items if context.fits(frozenset(item))])
    return paths_of(context.fitting(sorted(found, key=lambda item: found[item])))
