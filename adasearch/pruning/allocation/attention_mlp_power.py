"""Attention against MLP: a power of the share that goes says how much of it attention pays; depth changes nothing."""

from __future__ import annotations

from adasearch.documents import Positive, value
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION


@value
class AttentionMlpPowerOptions:
    """Settings: `alpha`, 1.5 in 2SSP; the larger, the more of the budget attention pays."""

    alpha: Positive = 1.5


_LEAST = 1e-6  # of an MLP's units: never dense, since its small steps are what ends on the budget


@ALLOCATION.register(options=AttentionMlpPowerOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: AttentionMlpPowerOptions) -> dict[str, float]:
    """Return s^(m / (a alpha)) for attention, m and a the parameters of MLPs and attention; MLPs pay what is left of s.

    s is the fraction of the groups' parameters that goes. 2SSP (arXiv 2501.17771) removes that fraction of the
    attention sublayers, rounded, as wholes; here each of them loses it. It never pays more than all of s, and where
    there are groups of one kind only, they are pruned alike.
    """
    sizes = dict.fromkeys(("attention", "mlp"), 0)
    for group in context.structure.groups:
        sizes[group.kind] += group.width * group.step_cost
    if not all(sizes.values()):
        return {group.name: 1.0 for group in context.structure.groups}
    goes = context.share * sum(sizes.values())
    power = context.share ** (sizes["mlp"] / sizes["attention"] / options.alpha)
    attention = min(power, goes / sizes["attention"])
    ratios = {"attention": attention, "mlp": max(_LEAST, (goes - attention * sizes["attention"]) / sizes["mlp"])}
    return {group.name: ratios[group.kind] for group in context.structure.groups}
