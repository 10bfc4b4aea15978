"""Linear in cosines: the more a layer leaves the residual stream as it is, the more it loses."""

from __future__ import annotations

from adasearch.documents import NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class CosineLinearOptions:
    """Settings.

    Args:
        amplitude: by how much the ratio of the most (un)important layer departs from 1. Adapt-Pruner removes 1 / T of
            everything in each of T steps, plus or minus A: that is A T, and its scripts take T = 50 and A = 0.02.
    """

    amplitude: NonNegative = 1.0


@ALLOCATION.register(options=CosineLinearOptions, needs=lambda _: frozenset({"cosine"}))
def shape(context: AllocationContext, options: CosineLinearOptions) -> dict[str, float]:
    """Return max(0, 1 - amplitude I_l): Adapt-Pruner (arXiv 2502.03460) with importances I that stay the same.

    I_l is minus the mean cosine between the layer's input and output, centred and divided by the largest magnitude.
    While I stays, t steps s_l(t) = max(0, s_l(t - 1) + 1 / T - A I_l) add up to a multiple of this; the published
    method measures I and the scores of units anew before every step.
    """
    cosines = context.cosines()
    mean = sum(cosines.values()) / len(cosines)
    importances = {layer: mean - cosine for layer, cosine in cosines.items()}
    largest = max(abs(i) for i in importances.values()) or 1.0  # layers that are all alike get the same ratio
    return context.spread({layer: max(0.0, 1 - options.amplitude * i / largest) for layer, i in importances.items()})
