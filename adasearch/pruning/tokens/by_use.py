"""By use: the tokens that a text of the user's domain needs least go."""

from __future__ import annotations

from adasearch.documents import Count, Share, value
from adasearch.pruning.tokens import Use
from adasearch.registry import TOKENS


@value
class ByUseOptions:
    """Settings.

    Args:
        remove: fraction of the rows of the embeddings that goes at most; those that any text may need stay.
        corpora: whose calibration part is counted; none given means the corpus of the calibration sample.
        tokens: how many tokens of each corpus are counted at most.
    """

    remove: Share = 0.25
    corpora: tuple[str, ...] = ()
    tokens: Count = 1_000_000


@TOKENS.register(options=ByUseOptions)
def plan(options: ByUseOptions) -> Use:
    """Return what is counted."""
    return Use(corpora=options.corpora, tokens=options.tokens)
