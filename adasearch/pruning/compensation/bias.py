"""Bias: each feature that is gone is replaced by its mean."""

from __future__ import annotations

from torch import nn

from adasearch.pruning.compensation import CompensationContext
from adasearch.registry import COMPENSATION, NoOptions


@COMPENSATION.register(needs=lambda _: frozenset({"moments"}), adds_bias=lambda _: True)
def compensate(model: nn.Module, context: CompensationContext, options: NoOptions) -> None:  # noqa: ARG001 - the set's
    """Add W (mean * removed) to the bias of each output projection: FLAP (arXiv 2312.11983), equation 6."""
    for cut in context.cuts(model):
        mean = cut.statistics.moments(cut.group.output).mean.to(cut.device)
        cut.add_bias(cut.dense_weight() @ (mean * ~cut.stays()))
