"""Pruning ratios over depth as a few coefficients: ``{layer_profile: {mlp: 3, attention: 2}}`` or ``{terms: 5}``.

The coefficients belong to the smooth functions of depth of the allocation `layer_profile`, lowest first; they are
free of scale because the budget fixes it. Five numbers describe what would be two per layer.
"""

from __future__ import annotations

from typing import Any

from adasearch.documents import Index, Positive, value
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import FloatParameter, Parameter, Scalar


@value
class LayerProfileOptions:
    """How many coefficients there are, and that each lies in [-bound, bound].

    Args:
        mlp: coefficients of the MLP profile.
        attention: coefficients of the attention profile.
        terms: both together instead, the MLP getting the odd one.
    """

    mlp: Index | None = None
    attention: Index | None = None
    terms: Index | None = None
    bound: Positive = 1.5


def _counts(options: LayerProfileOptions) -> dict[str, int]:
    """Return the number of coefficients of each profile."""
    if options.terms is not None:
        if options.mlp is not None or options.attention is not None:
            raise ValueError("must give either terms or mlp and attention, given both")
        return {"mlp": (options.terms + 1) // 2, "attention": options.terms // 2}
    return {"mlp": options.mlp or 0, "attention": options.attention or 0}


def _decode(values: dict[str, Scalar], path: str, options: LayerProfileOptions) -> dict[str, list[Scalar]]:
    return {part: [values[f"{path}.{part}.{i}"] for i in range(n)] for part, n in _counts(options).items()}


def _encode(item: dict[str, Any], path: str, options: LayerProfileOptions) -> dict[str, Scalar]:
    """Return the values of a profile; one that is shorter has zeros for its missing coefficients."""
    values: dict[str, Scalar] = {}
    for part, n in _counts(options).items():
        given = list(item.get(part, ()))
        if any(given[n:]):
            raise ValueError(f"{part} has {len(given)} coefficients, the space {n}")
        for i, coefficient in enumerate((given + [0.0] * n)[:n]):
            if abs(coefficient) > options.bound:
                raise ValueError(f"{part}.{i} is {coefficient:g}, the space ends at {options.bound:g}")
            values[f"{path}.{part}.{i}"] = float(coefficient)
    return values


@DIMENSIONS.register(options=LayerProfileOptions, decode=_decode, encode=_encode)
def parameters(path: str, options: LayerProfileOptions) -> dict[str, Parameter]:
    """Return one parameter for each coefficient: ``<path>.mlp.0``, ..., ``<path>.attention.0``, ...

    Raises:
        ValueError: no coefficient at all, or `terms` together with `mlp` or `attention`.
    """
    counts = _counts(options)
    if not any(counts.values()):
        raise ValueError("must have at least one term, such as {terms: 5}")
    bound = options.bound
    names = [f"{path}.{part}.{i}" for part, n in counts.items() for i in range(n)]
    return {name: FloatParameter(low=-bound, high=bound) for name in names}
