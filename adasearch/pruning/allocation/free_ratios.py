"""Free ratios: one relative ratio for each layer and kind of group, such as a search over levels finds them."""

from __future__ import annotations

from collections.abc import Sequence

from adasearch.documents import NonNegative, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION

LEAST = 1e-6
"""Ratio, relative to the largest, of groups that are to stay dense: they pay when all others have paid all they can."""


@value
class FreeRatiosOptions:
    """Settings: the relative ratio of each layer of the dense model, first layer first; any scale, the budget fixes it.

    Layers of ratio 0 stay dense as long as the others can pay the budget. A layer that leaves the model as a whole
    (`depth`) takes its ratio with it.

    Args:
        mlp: of the MLPs; empty gives all of them the mean ratio of attention.
        attention: of the attention sublayers; empty gives all of them the mean ratio of the MLPs.
    """

    mlp: tuple[NonNegative, ...] = ()
    attention: tuple[NonNegative, ...] = ()


def _mean(ratios: Sequence[float]) -> float:
    return sum(ratios) / len(ratios) if ratios else 1.0


def _lengths(options: FreeRatiosOptions) -> dict[str, int]:
    return {name: len(ratios) for name in ("mlp", "attention") if (ratios := getattr(options, name))}


@ALLOCATION.register(options=FreeRatiosOptions, needs=lambda _: frozenset(), layers=_lengths)
def shape(context: AllocationContext, options: FreeRatiosOptions) -> dict[str, float]:
    """Return the ratio of each group's layer, the largest 1 and none below `LEAST`; all zero is the uniform shape."""
    structure = context.structure
    numbers = structure.outline.layers(structure.dense.layers)  # in the dense model, of the layers that are there
    given = {"mlp": options.mlp, "attention": options.attention}
    other = {"mlp": _mean(options.attention), "attention": _mean(options.mlp)}
    ratios = {
        group.name: given[group.kind][numbers[group.layer]] if given[group.kind] else other[group.kind]
        for group in structure.groups
    }
    top = max(ratios.values(), default=0.0)
    return {name: max(ratio / top, LEAST) if top > 0 else 1.0 for name, ratio in ratios.items()}
