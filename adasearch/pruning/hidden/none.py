"""No rule: every dimension of the residual stream stays."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adasearch.documents import value
from adasearch.pruning.hidden import HiddenContext
from adasearch.registry import HIDDEN


@value
class NoneOptions:
    """Settings: nothing goes."""

    remove: Literal[0] = 0


@HIDDEN.register(options=NoneOptions, needs=lambda _: frozenset(), learns=False)
def score(context: HiddenContext, options: NoneOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return the same for every dimension (D)."""
    return torch.ones(context.dimensions)
