"""OWL: layers with more outliers among their weights times activations lose less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adasearch.documents import NonNegative, Positive, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.structure import Group
from adasearch.registry import ALLOCATION


@value
class OwlOptions:
    """Settings, the defaults those of OWL's script for LLaMA-7B.

    Args:
        m: M, an outlier is an entry above this multiple of its layer's mean.
        lam: lambda, half the distance between the largest ratio and the smallest, as a fraction of all units.
    """

    m: Positive = 5.0
    lam: NonNegative = 0.08


def _wanda(context: AllocationContext, group: Group) -> Tensor:
    """Return |W_ij| sqrt(E[x_j^2]) of the group's output projection (D × F, float32)."""
    root = context.known.moments(group.output).second_moment.sqrt().float()
    weight = context.weights[f"{group.output}.weight"]
    return weight.float().abs() * root.to(weight.device)


def _outliers(parts: Sequence[Tensor], m: float) -> float:
    """Return the percentage of all entries of `parts` that exceed `m` times the mean of them all."""
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.sum(dtype=torch.float64)) for part in parts) / count
    return 100 * sum(int((part > m * mean).sum()) for part in parts) / count


@ALLOCATION.register(options=OwlOptions, needs=lambda _: frozenset({"moments"}))
def shape(context: AllocationContext, options: OwlOptions) -> dict[str, float]:
    """Return s - (k_l - mean k) within [0, 1], k_l = 2 lambda (D_l - min D) / (max D - min D), s the share that goes.

    D_l is the percentage of outliers of layer l: OWL (ICML 2024, arXiv 2310.05175). It counts the entries of all linear
    projections; here those of the output projections count, whose inputs the statistics hold. Since s is the fraction
    of the groups' parameters that the budget takes, the projection scales by 1 where no ratio leaves [0, 1].
    """
    groups = context.structure.groups
    percent = {
        layer: _outliers([_wanda(context, g) for g in groups if g.layer == layer], options.m)
        for layer in context.layer_paths
    }
    least = min(percent.values())
    width = max(percent.values()) - least or 1.0  # where no layer differs, all ratios are the same
    claims = {layer: 2 * options.lam * (d - least) / width for layer, d in percent.items()}
    mean = sum(claims.values()) / len(claims)
    return context.spread({layer: min(1.0, max(0.0, context.share - k + mean)) for layer, k in claims.items()})
