"""Layer profile: a smooth curve over depth for each kind of group, from a few coefficients."""

from __future__ import annotations

import math

from adasearch.documents import Finite, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class LayerProfileOptions:
    """Settings: coefficients of the cosine basis; all zero, or none at all, is the uniform profile.

    Args:
        mlp: of cos(pi k (l + 1/2) / L) for k = 1, 2, ... in the log-ratio of the MLP of layer l. There is no constant:
            the budget fixes the scale.
        attention: the first is the constant (k = 0): exp of it is the ratio of attention over MLP; then k = 1, 2, ...
    """

    mlp: tuple[Finite, ...] = ()
    attention: tuple[Finite, ...] = ()


@ALLOCATION.register(options=LayerProfileOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: LayerProfileOptions) -> dict[str, float]:
    """Return exp(sum_k theta_k phi_k(l)) for each group, the largest of them 1."""
    layers = context.structure.layers
    logs = {}
    for group in context.structure.groups:
        start, theta = (0, options.attention) if group.kind == "attention" else (1, options.mlp)
        depth = math.pi * (group.layer + 0.5) / layers
        logs[group.name] = sum(t * math.cos(k * depth) for k, t in enumerate(theta, start))
    top = max(logs.values(), default=0.0)  # exp of what lies below the largest never overflows
    return {name: math.exp(log - top) for name, log in logs.items()}
