"""Optimal brain surgeon: the error left when a unit goes and the others make up for it as well as they can."""

from __future__ import annotations

from torch import Tensor

from adasearch.documents import Positive, value
from adasearch.pruning.importance import GroupView
from adasearch.pruning.output_error import block_errors, diagonal_blocks, inverse_second_moment
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
    inverse = inverse_second_moment(view, options.damping, "score")
    return block_errors(view.output_weight().double(), diagonal_blocks(inverse, view.group.units))
