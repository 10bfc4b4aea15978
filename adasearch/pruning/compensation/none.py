"""No compensation: the kept weights stay as they are."""

from __future__ import annotations

from torch import nn

from adasearch.pruning.compensation import CompensationContext
from adasearch.registry import COMPENSATION, NoOptions


@COMPENSATION.register(needs=lambda _: frozenset(), adds_bias=lambda _: False)
def compensate(model: nn.Module, context: CompensationContext, options: NoOptions) -> None:  # the signature of the set
    """Change nothing."""
