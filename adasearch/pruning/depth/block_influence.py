"""Block influence: what changes the direction of the residual stream least goes first."""

from __future__ import annotations

from adasearch.documents import Index, value
from adasearch.pruning.depth import DepthContext, DepthOptions, Item, Unit, paths_of
from adasearch.registry import DEPTH


@value
class BlockInfluenceOptions(DepthOptions):
    """Settings.

    Args:
        unit: what goes at once.
        protect_first: number of layers at the bottom that stay.
        protect_last: number of layers at the top that stay.
    """

    unit: Unit = "layer"
    protect_first: Index = 0
    protect_last: Index = 0


@DEPTH.register(options=BlockInfluenceOptions, needs=lambda _: frozenset({"cosine"}), uses_loss=False)
def choose(context: DepthContext, options: BlockInfluenceOptions) -> tuple[str, ...]:
    """Return the items of the lowest influence 1 - E_t cos(h_t, h'_t), as many as fit.

    h is the residual stream before and h' after a layer or sublayer (ShortGPT, arXiv 2403.03853, equation 1; Minitron,
    arXiv 2407.14679, takes the same). The angle of that mean, arccos / pi, orders them the same. Of items with equal
    influence the one nearer the input goes first.
    """

    def influence(item: Item) -> float:
        place = item[0] if len(item) == 1 else item[0].rpartition(".")[0]
        return 1.0 - context.known.cosine(place)

    items = context.items(options.unit, options.protect_first, options.protect_last)
    return paths_of(context.fitting(sorted(items, key=influence)))
