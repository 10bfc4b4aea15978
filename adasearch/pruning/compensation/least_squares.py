"""Least squares: the kept columns of each output projection reproduce the dense output as well as they can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adasearch.documents import Positive, value
from adasearch.errors import TrialError
from adasearch.pruning.accumulators import damped
from adasearch.pruning.compensation import CompensationContext
from adasearch.registry import COMPENSATION


@value
class LeastSquaresOptions:
    """Settings.

    Args:
        damping: added to the diagonal of E[x x^T] as a multiple of its mean; the larger, the closer the kept columns
            stay to what they were.
        with_bias: whether the fit has an intercept, which the output projections then need a bias for.
    """

    damping: Positive = 0.01
    with_bias: bool = False


def solve(weight: Tensor, second: Tensor, stays: Tensor) -> Tensor:
    """Return W_S + W_R H_RS H_SS^-1 (D × S), which is W H_:S H_SS^-1, for the kept features S and the others R.

    It minimises tr((W - W') H (W - W')^T) over W' that is zero outside S. Removing features one by one by the optimal
    brain surgeon, or block by block, ends in the same matrix.

    Args:
        weight: dense, D × F, float64.
        second: H, F × F, positive definite, float64.
        stays: F, bool.

    Raises:
        TrialError: H_SS is not positive definite (kind ``nan``).
    """
    factor, failed = torch.linalg.cholesky_ex(second[stays][:, stays])
    if int(failed):
        raise TrialError("nan", "E[x x^T] must be positive definite: raise least_squares.damping", "compensate")
    spill = weight[:, ~stays] @ second[~stays][:, stays]
    return weight[:, stays] + torch.cholesky_solve(spill.T, factor).T


def _adds_bias(options: LeastSquaresOptions) -> bool:
    return options.with_bias


@COMPENSATION.register(options=LeastSquaresOptions, needs=lambda _: frozenset({"covariance"}), adds_bias=_adds_bias)
def compensate(model: nn.Module, context: CompensationContext, options: LeastSquaresOptions) -> None:
    """Set each output projection to the least squares fit of its dense output: SlimGPT, FASP (arXiv 2501.09412).

    With an intercept the features are centred first, and the bias takes W mean - W_S' mean_S.
    """
    for cut in context.cuts(model):
        covariance = cut.statistics.covariance(cut.group.output)
        second = damped(covariance.matrix(centred=options.with_bias).to(cut.device), options.damping)
        dense, stays = cut.dense_weight(), cut.stays()
        weight = solve(dense, second, stays)
        cut.set_weight(weight)
        if options.with_bias:
            mean = covariance.mean.to(cut.device)
            cut.add_bias(dense @ mean - weight @ mean[stays])
