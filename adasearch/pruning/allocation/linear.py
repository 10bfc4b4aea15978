"""Linear: ratios go from one end of the model to the other in equal steps."""

from __future__ import annotations

from adasearch.documents import NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class LinearOptions:
    """Settings: relative ratios `r0` of the first layer and `rn` of the last; from 1 to 4 as in `log_increase`."""

    r0: NonNegative = 1.0
    rn: NonNegative = 4.0


@ALLOCATION.register(options=LinearOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: LinearOptions) -> dict[str, float]:
    """Return r0 + (rn - r0) i / (n - 1) for the groups of layer i of n; a model of one layer has r0."""
    end = max(1, context.structure.layers - 1)
    rise = options.rn - options.r0
    return context.spread({i: options.r0 + rise * i / end for i in context.layer_paths})
