"""Rules for the vocabulary: how many rows of the embeddings go, and by what text their use is counted. One file each.

An entry is ``plan(options) -> Use | None``: what to count, None to leave the vocabulary alone. Which rows then stay
follows from the counts and the tokenizer, see `vocabulary.choose`: the rows of highest use, and all that a text may
need. Its options have `remove`, the fraction of the rows that goes at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from adasearch.config import Component
from adasearch.registry import TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What counts as use of a token.

    Args:
        corpora: whose calibration part is read; none given means the corpus of the calibration sample.
        tokens: how many tokens of each are counted at most.
    """

    corpora: tuple[str, ...]
    tokens: int


def use(component: Component) -> Use | None:
    """Return what is counted, None where the vocabulary stays as it is."""
    found: Use | None = TOKENS.get(component.type).function(component.options)
    return found
