"""Multiple-choice items as values, and how many of them each of the three disjoint sets takes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from adasearch.documents import Count, Index, value

Role = Literal["search", "select", "report"]
"""search: what the optimizer sees; select: finalists are chosen on it; report: scored once, at the end."""


@value
class Item:
    """One question with its choices, C of them.

    Args:
        task: spec of the task that it belongs to.
        id: 16 hexadecimal digits, the hash of its content.
        contexts: the text before each choice; a single text when all choices follow the same one.
        choices: the texts that are scored, delimiter included, one per choice.
        gold: index of the right choice.
        lengths: characters of each choice as lm-eval counts them for `acc_norm`.
        acc_norm: the task reports `acc_norm` beside `acc`.
    """

    task: str
    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int
    lengths: tuple[int, ...]
    acc_norm: bool = True

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return (context, continuation) of each choice, in order."""
        contexts = self.contexts * len(self.choices) if len(self.contexts) == 1 else self.contexts
        return tuple(zip(contexts, self.choices, strict=True))


@value
class Draw:
    """Which items of a task go where: items in an order drawn by `seed`, the first to search, the next to select.

    Args:
        report: number of report items, None for all there are.
        shared: search and report use the same split; report then takes items after those of search and select.
    """

    seed: Index
    search: Count
    select: Count
    report: Count | None = None
    shared: bool = False
    data_root: str | None = None


def content_hash(*texts: str) -> str:
    """Return 16 hexadecimal digits that tell these texts from any others."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


def shuffled(ids: Iterable[str], seed: int) -> list[str]:
    """Return ids in an order drawn by `seed` that does not depend on which other ids there are."""
    return sorted(ids, key=lambda name: content_hash(str(seed), name))
