"""Magnitude: dimensions by which the weights hang least together with the residual stream go."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.documents import Share, value
from adasearch.pruning.hidden import HiddenContext
from adasearch.registry import HIDDEN


@value
class MagnitudeOptions:
    """Settings: `remove`, the fraction of the dimensions that goes."""

    remove: Share = 0.1


@HIDDEN.register(options=MagnitudeOptions, needs=lambda _: frozenset(), learns=False)
def score(context: HiddenContext, options: MagnitudeOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return the root of the sum of squares of all that a dimension owns in matrices (D, float64).

    LLM-Pruner's channel-wise magnitude (arXiv 2305.11627), whose groups run along the residual stream.
    """
    return magnitudes(context)


def magnitudes(context: HiddenContext) -> Tensor:
    """Return the scores of `score`."""
    total = torch.zeros(context.dimensions, dtype=torch.float64)
    for piece in context.structure.stream:
        weight = context.weights[piece.parameter]
        if weight.ndim > 1:
            total += weight.detach().float().square().sum(1 - piece.dim).double().cpu()
    return total.sqrt()
