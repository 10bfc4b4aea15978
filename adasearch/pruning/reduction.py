"""Many numbers into one per unit, and the scores of a group onto one scale: what criteria and allocations share.

Shape letters: U units of a group, M matrices that a unit owns parts of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Inside = Literal["sum", "max", "l2", "mean"]
"""How the elements that a unit owns in one matrix become one number; ``l2`` is the root of their sum of squares."""
Across = Literal["sum", "mean", "max", "prod", "first", "last"]
"""How the numbers of the matrices that a unit owns parts of become one, in the order of the group's slices."""
Normalise = Literal["none", "zscore", "l2", "minmax", "mean", "rank"]
"""How scores of one group become comparable with those of another criterion or group, see `normalised`."""

_INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s.sum(1),
    "max": lambda s: s.amax(1),
    "l2": lambda s: s.square().sum(1).sqrt(),
    "mean": lambda s: s.mean(1),
}
_ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s.sum(0),
    "mean": lambda s: s.mean(0),
    "max": lambda s: s.amax(0),
    "prod": lambda s: s.prod(0),
    "first": lambda s: s[0],
    "last": lambda s: s[-1],
}


def inside(elements: Tensor, how: Inside) -> Tensor:
    """Return one number per unit (U) of the scores of its elements in one matrix (U × ..., >= 0)."""
    return _INSIDE[how](elements.flatten(1))


def across(parts: Sequence[Tensor], how: Across) -> Tensor:
    """Return one number per unit (U) of its scores in M matrices (M times U): LLM-Pruner (arXiv 2305.11627)."""
    return _ACROSS[how](torch.stack(list(parts)))


def normalised(scores: Tensor, how: Normalise) -> Tensor:
    """Return the scores of one group (U) on a scale that does not depend on their unit (U, float64).

    ``zscore`` (s - mean) / std, ``l2`` s / ||s||, ``minmax`` to [0, 1], ``mean`` s / mean |s|, ``rank`` the share of
    the other units that score lower, ``none`` as they are. A group of equal scores stays finite: all of them are 0
    where a spread is divided by.
    """
    tiny = torch.finfo(torch.float64).tiny
    s = scores.double()
    if how == "zscore":
        spread = s.std() if len(s) > 1 else torch.zeros((), dtype=torch.float64)
        return (s - s.mean()) / spread.clamp_min(tiny)
    if how == "minmax":
        return (s - s.min()) / (s.max() - s.min()).clamp_min(tiny)
    if how == "l2":
        return s / s.square().sum().sqrt().clamp_min(tiny)
    if how == "mean":
        return s / s.abs().mean().clamp_min(tiny)
    if how == "rank":
        # Counted, not numbered: equal scores must have equal ranks.
        return torch.searchsorted(s.sort().values, s).double() / max(1, len(s) - 1)
    return s
