"""Magnitude: the norm of the weights that a unit owns."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adasearch.documents import value
from adasearch.pruning.importance import GroupView, Probe
from adasearch.registry import IMPORTANCE


@value
class MagnitudeOptions:
    """Settings: the exponent `p`, and which matrices count: all that the unit owns, or the output projection."""

    p: Literal[1, 2] = 2
    probe: Probe = "all"


@IMPORTANCE.register(options=MagnitudeOptions, needs=lambda _: frozenset())
def score(view: GroupView, options: MagnitudeOptions) -> Tensor:
    """Return the sum of |w|^p over the unit's elements (U): the L1 and L2 criteria of LLM-Pruner (arXiv 2305.11627)."""
    parts = [view.weight(name).double().abs().pow(options.p).sum(1) for name in view.members(options.probe)]
    return torch.stack(parts).sum(0)
