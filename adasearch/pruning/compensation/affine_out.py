"""Affine: each output feature of a cut projection is scaled and shifted towards what it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adasearch.pruning.compensation import CompensationContext
from adasearch.registry import COMPENSATION, NoOptions

_STILL = 1e-6
"""Variance over mean square below which an output counts as constant: the statistics are no more exact than that."""


def scales(dense: Tensor, second: Tensor, mean: Tensor, stays: Tensor) -> Tensor:
    """Return a_i = Cov(y_i, x_i) / Var(x_i) for each output (D), where y = W f and x = W_S f_S; 1 where x is constant.

    Args:
        dense: W, D × F, float64.
        second: E[f f^T] of the features, F × F, float64.
        mean: E[f], F, float64.
        stays: which features stay (S of F), bool.
    """
    kept = dense[:, stays]
    with_all = kept @ (second - torch.outer(mean, mean))[stays]
    variance = (with_all[:, stays] * kept).sum(1)
    square = variance + (kept @ mean[stays]).square()
    slope = (with_all * dense).sum(1) / variance
    return torch.where(variance > _STILL * square, slope, torch.ones_like(slope))


@COMPENSATION.register(needs=lambda _: frozenset({"covariance"}), adds_bias=lambda _: True)
def compensate(model: nn.Module, context: CompensationContext, options: NoOptions) -> None:  # noqa: ARG001 - the set's
    """Set row i of each output projection to a_i W_S,i and shift it by E[y_i] - a_i E[x_i]: SlimLLM (arXiv 2505.22689).

    y is the dense output and x what the kept features make of it; a_i and the shift are the least squares fit of y_i by
    x_i over the calibration tokens. SlimLLM fits on inputs that come through the layers already cut; here they are the
    dense model's, on which the covariance gives the fit exactly.
    """
    for cut in context.cuts(model):
        covariance = cut.statistics.covariance(cut.group.output)
        second, mean = covariance.matrix().to(cut.device), covariance.mean.to(cut.device)
        dense, stays = cut.dense_weight(), cut.stays()
        weight = scales(dense, second, mean, stays)[:, None] * dense[:, stays]
        cut.set_weight(weight)
        cut.add_bias(dense @ mean - weight @ mean[stays])
