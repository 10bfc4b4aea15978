"""Global score: one threshold over the units of all groups decides how many go from each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adasearch.documents import Fraction, value
from adasearch.errors import ConfigError
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.projection import removal
from adasearch.pruning.reduction import Normalise, normalised
from adasearch.pruning.structure import Group
from adasearch.registry import ALLOCATION


@value
class GlobalScoreOptions:
    """Settings.

    Args:
        normalise: of scores within a group, so that layers compare: ``zscore`` (s - mean) / std, ``l2`` s / ||s||,
            ``minmax`` to [0, 1], ``mean`` s / mean |s|, ``rank`` the share of the others that score lower, or ``none``.
        per_parameter: whether units compare by score per parameter (removing the least important parameters) or by
            score alone, as FLAP and LLM-Pruner do.
        scope: ``joint`` has one threshold; ``type`` has one for attention and one for MLPs, each paying its share.
        minimum: share of its units that each group keeps at least.
    """

    normalise: Normalise = "zscore"
    per_parameter: bool = False
    scope: Literal["joint", "type"] = "joint"
    minimum: Fraction = 0.1


def _steps(group: Group, scores: Tensor) -> Tensor:
    """Return the score of each step by which the width may fall (width), cheapest first.

    A step takes the least important unit left in every partition, and scores their mean.
    """
    lowest: Tensor = scores.view(group.partitions, group.width).sort(dim=1).values
    return lowest.mean(0)


def _removed(groups: list[Group], steps: dict[str, Tensor], need: int, minimum: float) -> dict[str, int]:
    """Return how many steps of each group fall below the threshold at which `need` parameters are gone.

    Raises:
        ConfigError: the shares kept at least leave too little to remove.
    """
    free = [steps[g.name][: g.width - max(1, int(-(-minimum * g.width // 1)))] for g in groups]
    costs = torch.cat([torch.full((len(f),), g.step_cost) for g, f in zip(groups, free, strict=True)])
    owners = torch.cat([torch.full((len(f),), i) for i, f in enumerate(free)])
    if int(costs.sum()) < need:
        where = "allocation.global_score.minimum"
        raise ConfigError(
            where, f"must leave {need} parameters to remove, but with {minimum} only {int(costs.sum())} can go"
        )
    order = torch.sort(torch.cat(free), stable=True).indices
    before = costs[order].cumsum(0) - costs[order]
    counts = torch.bincount(owners[order][before < need], minlength=len(groups))
    return {g.name: int(n) for g, n in zip(groups, counts, strict=True)}


@ALLOCATION.register(options=GlobalScoreOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: GlobalScoreOptions) -> dict[str, float]:
    """Return the fraction of each group's units that lies below the threshold.

    Raises:
        ConfigError: the shares kept at least leave too little to remove.
    """
    groups = context.structure.groups
    steps = {g.name: _steps(g, normalised(context.scores[g.name], options.normalise)) for g in groups}
    if options.per_parameter:
        # A score per parameter means something for scores >= 0 only; z-scores are lifted by the lowest of all.
        low = min(0.0, *(float(s.min()) for s in steps.values()))
        steps = {g.name: (steps[g.name] - low) / g.unit_cost for g in groups}
    need = removal(context.structure, context.budget, context.biases)
    total = sum(g.width * g.step_cost for g in groups)
    counts: dict[str, int] = {}
    for kind in sorted({g.kind for g in groups}) if options.scope == "type" else [None]:
        part = [g for g in groups if kind in {None, g.kind}]
        share = sum(g.width * g.step_cost for g in part)
        counts |= _removed(part, steps, -(-need * share // total), options.minimum)
    return {g.name: counts[g.name] / g.width for g in groups}
