"""Random scores: the floor that every criterion must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE, NoOptions


@IMPORTANCE.register(needs=lambda _: frozenset())
def score(view: GroupView, options: NoOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return U independent uniform scores, the same for the same seed and group."""
    return torch.rand(view.group.units, generator=view.generator())
