"""Uniform: the same fraction of units goes from every group."""

from __future__ import annotations

from adasearch.documents import value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class UniformOptions:
    """Settings.

    Args:
        equal_widths: all layers end equally wide, as ``budget.uniform`` makes them, which has no room for added biases;
            else what rounding leaves over is spread over the depth, and widths differ by a unit.
    """

    equal_widths: bool = False


@ALLOCATION.register(
    options=UniformOptions, needs=lambda _: frozenset(), equal_widths=lambda options: options.equal_widths
)
def shape(context: AllocationContext, options: UniformOptions) -> dict[str, float]:  # noqa: ARG001 - the signature of the set
    """Return the ratio 1 for each group."""
    return {group.name: 1.0 for group in context.structure.groups}
