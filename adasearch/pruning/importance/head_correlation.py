"""Head correlation: how much the output of a sublayer changes its course over tokens when a unit is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE, NoOptions

_ROUNDING = 1e-12
"""Share of an output's variance below which what is left of it counts as nothing: correlations with it are 0."""


def correlations(whole: Tensor, with_output: Tensor, removed: Tensor) -> Tensor:
    """Return |corr(y, y - c)| over tokens, for parts c that are left out of an output y; 0 where nothing is left.

    Args:
        whole: Var(y), by output feature (D).
        with_output: Cov(y, c) (U × D).
        removed: Var(c) (U × D).
    """
    rest = torch.maximum(whole - 2 * with_output + removed, _ROUNDING * whole)
    norm = (whole * rest).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return ((whole - with_output) / norm).abs().clamp_max(1)


@IMPORTANCE.register(needs=lambda _: frozenset({"covariance"}))
def score(view: GroupView, options: NoOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return sum_i (1 - |corr(y_i, y_i - c_i)|) with y the output and c the part of it that a unit makes (U).

    The correlation runs over tokens for each output feature i. SlimLLM (arXiv 2505.22689) judges heads by it, as
    published before the swaps that follow; a high correlation says that a head can go. It is read from the centred
    covariance C of the projection's input: Cov(y, c) = w_y^T C w_c for the rows w of the projection.
    """
    covariance, columns = view.covariance().matrix(centred=True), view.output_weight().double()
    units, block = columns.shape[:2]
    spread = (covariance @ columns.flatten(0, 1)).view_as(columns)
    with_output = (columns * spread).sum(1)
    blocks = covariance.view(units, block, units, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = (columns * (blocks @ columns)).sum(1)
    return (1 - correlations(with_output.sum(0), with_output, own)).sum(1)
