"""Skip ends: the first and last layers stay dense, the others lose the same fraction."""

from __future__ import annotations

from adasearch.documents import Index, value
from adasearch.errors import ConfigError
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class SkipEndsOptions:
    """Settings: how many layers stay dense at the `first` and `last` end; LLM-Pruner spares 4 and 2 of 32."""

    first: Index = 4
    last: Index = 2


@ALLOCATION.register(options=SkipEndsOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: SkipEndsOptions) -> dict[str, float]:
    """Return the ratio 1 for groups between the ends and 0 for the others.

    Raises:
        ConfigError: no layer lies between the ends.
    """
    layers = context.structure.layers
    if options.first + options.last >= layers:
        given = f"given first {options.first} and last {options.last}"
        raise ConfigError("allocation.skip_ends", f"must leave some of the {layers} layers to prune, {given}")
    inside = range(options.first, layers - options.last)
    return {group.name: float(group.layer in inside) for group in context.structure.groups}
