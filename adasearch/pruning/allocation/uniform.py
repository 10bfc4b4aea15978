"""Uniform: the same fraction of units goes from every group."""

from __future__ import annotations

from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION, NoOptions


@ALLOCATION.register(needs=lambda _: frozenset())
def shape(context: AllocationContext, options: NoOptions) -> dict[str, float]:  # noqa: ARG001 - the signature of the set
    """Return the ratio 1 for each group."""
    return {group.name: 1.0 for group in context.structure.groups}
