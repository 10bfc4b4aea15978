"""None: all layers stay, widths meet the budget."""

from __future__ import annotations

from adasearch.pruning.depth import DepthContext
from adasearch.registry import DEPTH, NoOptions


@DEPTH.register(needs=lambda _: frozenset(), uses_loss=False)
def choose(context: DepthContext, options: NoOptions) -> tuple[str, ...]:  # noqa: ARG001 - the signature of all
    """Return nothing."""
    return ()
