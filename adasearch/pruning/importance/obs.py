"""Optimal brain surgeon: the error left when a unit goes and the others make up for it as well as they can."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.documents import Positive, value
from adasearch.errors import TrialError
from adasearch.pruning.accumulators import damped
from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE


@value
class ObsOptions:
    """Settings: `damping` is added to the diagonal of the Hessian, as a multiple of its mean."""

    damping: Positive = 0.01


@IMPORTANCE.register(options=ObsOptions, needs=lambda _: frozenset({"covariance"}))
def score(view: GroupView, options: ObsOptions) -> Tensor:
    """Return tr(W_B ([H^-1]_BB)^-1 W_B^T) for the features B of each unit (U), with H = E[x x^T] + damping.

    For a unit of one feature that is ||W_:,j||^2 / [H^-1]_jj. It is the increase of the mean squared error of the
    projection's output (plus the damping's penalty) under least squares compensation; SlimGPT (NeurIPS 2024), ZipLM.
    """
    factor, failed = torch.linalg.cholesky_ex(damped(view.covariance().matrix(), options.damping))
    if int(failed):
        raise TrialError(
            "nan", f"E[x x^T] of {view.group.output} must be positive definite: raise obs.damping", "score"
        )
    units, block = view.group.units, view.group.output_block
    inverse = torch.cholesky_inverse(factor).view(units, block, units, block)
    blocks = inverse.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = view.output_weight().double()
    # For one feature a batched solve would only be a slow division.
    solved = columns / blocks if block == 1 else torch.linalg.solve(blocks, columns)
    return (columns * solved).sum((1, 2))
