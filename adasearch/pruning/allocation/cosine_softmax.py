"""Softmax of cosines: the layers that change the residual stream least lose most, those that change it most nothing."""

from __future__ import annotations

import math

from adasearch.documents import Count, NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class CosineSoftmaxOptions:
    """Settings.

    Args:
        alpha: factor of the cosines; SlimLLM takes 10 where a fifth of the parameters goes, 7 where half goes.
        n_layers: number of layers that may be pruned, all of them where the model has fewer; SlimLLM takes 26 of 32
            where a fifth goes, 30 where half goes.
    """

    alpha: NonNegative = 10.0
    n_layers: Count = 26


@ALLOCATION.register(options=CosineSoftmaxOptions, needs=lambda _: frozenset({"cosine"}))
def shape(context: AllocationContext, options: CosineSoftmaxOptions) -> dict[str, float]:
    """Return n softmax(alpha c) over the n layers of the highest cosine c between their input and output, else 0.

    The formula is that of SlimLLM's released code (arXiv 2505.22689). Of layers with equal cosines the first counts.
    """
    cosines = context.cosines()
    chosen = sorted(cosines, key=lambda layer: (-cosines[layer], layer))[: options.n_layers]
    top = cosines[chosen[0]]  # exp of what lies below the highest never overflows
    powers = {layer: math.exp(options.alpha * (cosines[layer] - top)) for layer in chosen}
    scale = len(chosen) / sum(powers.values())
    return context.spread({layer: scale * powers.get(layer, 0.0) for layer in cosines})
