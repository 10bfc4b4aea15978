"""Removal one by one, by the loss of the model that is left."""

from __future__ import annotations

from adasearch.pruning.depth import DepthContext, Item


def losses(context: DepthContext, gone: frozenset[str], items: list[Item]) -> dict[Item, float]:
    """Return the loss without `gone` and each of `items` (given in the order of the model).

    They are tried from the top of the model to its bottom, so that each takes up where the last one differs.
    """
    found = {item: context.loss(gone | set(item)) for item in reversed(items)}
    return {item: found[item] for item in items}


def greedy(context: DepthContext, items: tuple[Item, ...], limit: int | None = None) -> tuple[Item, ...]:
    """Return items in the order in which they go: always the one without which the loss is lowest, while one fits.

    Args:
        context: with the loss, and the room.
        items: that may go, in the order of the model; of equal losses the first counts.
        limit: number of them that may go at most; None leaves that to the room.
    """
    taken: list[Item] = []
    gone: frozenset[str] = frozenset()
    while limit is None or len(taken) < limit:
        left = [item for item in items if item not in taken and context.fits(gone | set(item))]
        if not left:
            break
        found = losses(context, gone, left)
        best = min(left, key=lambda item: found[item])
        taken.append(best)
        gone |= set(best)
    return tuple(taken)
