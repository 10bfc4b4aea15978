"""Principal directions: how far a unit writes along the directions in which the output of its sublayer varies."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.pruning.reduction import inside
from adasearch.registry import IMPORTANCE, NoOptions


def _directions(view: GroupView) -> Tensor:
    """Return the principal directions of the output as columns, each by its weight sigmoid(w / mean(w)) (D × D)."""
    columns = view.output_weight().double().flatten(0, 1)
    covariance = columns.T @ view.covariance().matrix(centred=True) @ columns
    variances, directions = torch.linalg.eigh(covariance)
    mean = variances.mean().clamp_min(torch.finfo(variances.dtype).tiny)
    weighed: Tensor = directions * torch.sigmoid(variances / mean)
    return weighed


@IMPORTANCE.register(needs=lambda _: frozenset({"moments", "covariance", "inputs"}))
def score(view: GroupView, options: NoOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return sum_M ||M_u * n||_2 + ||z_u|| ||(|W_:,u^T V|) * sigmoid(w / mean(w))||_2 (U): SlimLLM (arXiv 2505.22689).

    M are the matrices whose rows a unit owns (gate and up projection), n the norms of what they read, z the unit's
    activations, W the output projection, and V diag(w) V^T the covariance of the sublayer's output. Norms are root mean
    squares over tokens, which is one factor for all terms. Features of a unit combine by the root of their sum of
    squares; SlimLLM scores channels only, which have one. Units of attention are scored alike.
    """
    output = f"{view.group.output}.weight"
    aligned = view.output_weight().double() @ _directions(view)
    total = inside(view.norms(output) * aligned, "l2")
    for name in view.members():
        if name != output:
            total = total + inside(view.rows_of(name).double() * view.norms(name), "l2")
    return total
