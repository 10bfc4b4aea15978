"""No rule: every token stays."""

from __future__ import annotations

from typing import Literal

from adasearch.documents import value
from adasearch.pruning.tokens import Use
from adasearch.registry import TOKENS


@value
class NoneOptions:
    """Settings: nothing goes."""

    remove: Literal[0] = 0


@TOKENS.register(options=NoneOptions)
def plan(options: NoneOptions) -> Use | None:  # noqa: ARG001 - the signature of the set
    """Return that nothing is counted."""
    return None
