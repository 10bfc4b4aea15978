"""Logarithmic increase: ratios rise with depth, fast at first, since later layers inherit an early layer's error."""

from __future__ import annotations

import math

from adasearch.documents import NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class LogIncreaseOptions:
    """Settings: relative ratios `r0` of the first layer and `rn` of the last.

    SlimGPT does not publish its ends; that the last layer loses four times the first one's share is our reading.
    """

    r0: NonNegative = 1.0
    rn: NonNegative = 4.0


@ALLOCATION.register(options=LogIncreaseOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: LogIncreaseOptions) -> dict[str, float]:
    """Return r0 + (rn - r0) log(i + 1) / log(n) for the groups of layer i of n: SlimGPT's incremental pruning ratio.

    SlimGPT (NeurIPS 2024, arXiv 2412.18110), equation 6. A model of one layer has r0.
    """
    end = math.log(context.structure.layers) or 1.0
    rise = options.rn - options.r0
    return context.spread({i: options.r0 + rise * math.log(i + 1) / end for i in context.layer_paths})
