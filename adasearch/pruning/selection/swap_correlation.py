"""Swaps by correlation: heads that went are exchanged while the output keeps its course over tokens better."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.pruning.importance.head_correlation import correlations
from adasearch.pruning.plan import highest
from adasearch.pruning.selection import partition_of
from adasearch.registry import SELECTION, NoOptions


class RemovedParts:
    """Second moments, over tokens, of the parts c_u that units make of each output feature y, means taken off.

    Args:
        view: of the group, with its covariance.
    """

    def __init__(self, view: GroupView) -> None:
        covariance, columns = view.covariance().matrix(centred=True), view.output_weight().double()
        units, block = columns.shape[:2]
        flat = columns.flatten(0, 1)
        by_unit = covariance.view(len(flat), units, block)
        # One unit at a time: all features against all at once would be U times as large.
        parts = [(flat * (by_unit[:, u] @ columns[u])).view(units, block, -1).sum(1) for u in range(units)]
        self.pairwise = torch.stack(parts)
        """Cov(c_u, c_v) by output feature (U × U × D)."""
        self.with_output = self.pairwise.sum(1)
        """Cov(c_u, y) by output feature (U × D)."""

    def totals(self, fixed: list[int], tried: Tensor) -> Tensor:
        """Return sum_i |corr(y_i, y_i - c_i)| with c the parts of the units in `fixed` and one of `tried` (tried)."""
        own = self.pairwise[tried, tried]
        shared = self.pairwise[tried][:, fixed].sum(1)
        removed = own + 2 * shared + self.pairwise[fixed][:, fixed].sum((0, 1))
        with_output = self.with_output[tried] + self.with_output[fixed].sum(0)
        return correlations(self.with_output.sum(0), with_output, removed).sum(1)


@SELECTION.register(needs=lambda _: frozenset({"covariance"}))
def choose(view: GroupView, scores: Tensor, width: int, options: NoOptions) -> tuple[int, ...]:  # noqa: ARG001 - signature
    """Return the units left when each removed unit was tried against every kept one, once; MLPs keep the top.

    SlimLLM (arXiv 2505.22689): a removed head takes the place of a kept one where the correlation between the full
    output and the output without the removed heads, summed over output features, rises. Trying the kept heads one after
    the other and staying with whatever is better ends with the best of them. Removed heads come in the order of their
    scores, the lowest first, and stay within their partition.
    """
    group = view.group
    kept = highest(group, scores, width)
    if group.kind != "attention":
        return kept
    part, parts = partition_of(group), RemovedParts(view)
    out = torch.ones(group.units, dtype=torch.bool)
    out[list(kept)] = False
    for unit in [u for u in scores.argsort(stable=True).tolist() if out[u]]:
        fixed = [u for u in out.nonzero().flatten().tolist() if u != unit]
        # Itself first: of equal ones it is the first that goes.
        tried = torch.cat([torch.tensor([unit]), (~out & (part == part[unit])).nonzero().flatten()])
        best = int(tried[parts.totals(fixed, tried).argmax()])
        out[unit], out[best] = False, True
    return tuple((~out).nonzero().flatten().tolist())
