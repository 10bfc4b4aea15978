"""Greedy optimal brain surgeon: the unit that costs least goes, the others make up for it, and so on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adasearch.documents import Positive, Share, value
from adasearch.pruning.importance import GroupView
from adasearch.pruning.output_error import LeastSquaresError
from adasearch.pruning.selection import partition_of
from adasearch.registry import SELECTION


@value
class ObsGreedyOptions:
    """Settings.

    Args:
        damping: added to the diagonal of E[x x^T] as a multiple of its mean.
        step: share of the channels still to go that go in one update, one at least: 0 is one by one, 1 all at once by
            the errors of the dense model. SlimGPT's group sizes fall from 1024 to 8 over a layer; a share falls the
            same way at any width, and takes about ln(channels to go) / step updates. Attention always goes one unit by
            one.
    """

    damping: Positive = 0.01
    step: Share = 0.25


@SELECTION.register(options=ObsGreedyOptions, needs=lambda _: frozenset({"covariance"}))
def choose(view: GroupView, scores: Tensor, width: int, options: ObsGreedyOptions) -> tuple[int, ...]:  # noqa: ARG001 - signature
    """Return what is left when units of the least tr(W_B ([H^-1]_BB)^-1 W_B^T) go, W and H^-1 downdated in between.

    SlimGPT (NeurIPS 2024, arXiv 2412.18110), ZipLM (arXiv 2302.04089) and DarwinLM choose so. `scores` are not looked
    at: allocation may have used them. The weights are not changed; least squares on the kept units ends in the same
    ones, see `compensation.least_squares`.
    """
    group = view.group
    table = LeastSquaresError(view, options.damping)
    step = options.step if group.kind == "mlp" else 0.0
    part = partition_of(group)
    quota = torch.full((group.partitions,), group.width - width)
    while (left := int(quota.sum())) > 0:
        costs = table.moves().masked_fill(table.out | (quota[part] == 0), math.inf)
        goes: list[int] = []
        for unit in costs.argsort(stable=True)[: max(1, math.ceil(step * left))].tolist():
            if quota[part[unit]] > 0 and math.isfinite(costs[unit]):
                quota[part[unit]] -= 1
                goes.append(unit)
        table.move(goes)
    return tuple((~table.out).nonzero().flatten().tolist())
