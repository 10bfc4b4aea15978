"""A free ratio for every layer, in levels: ``{layer_levels: {layers: 30, levels: 8, attention: true}}``.

The levels belong to the relative ratios of the allocation `free_ratios`: level k of n is k / (n - 1), and level 0 is a
layer that stays dense as long as others can pay. The budget fixes the scale, so a step up in one layer and one down
in another leave the sum as it is: the move of EvoPress (arXiv 2410.14649), DarwinLM and Tyr.
"""

from __future__ import annotations

from typing import Annotated, Any

import pydantic

from adasearch.documents import Index, value
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import IntParameter, Parameter, Scalar


@value
class LayerLevelsOptions:
    """How many layers the model has, and how finely they are told apart.

    Args:
        layers: of the model.
        levels: of each layer, from 0.
        attention: attention has levels of its own; else it takes the mean ratio of the MLPs.
    """

    layers: Index = 0
    levels: Annotated[int, pydantic.Field(ge=2)] = 8
    attention: bool = True


def _parts(options: LayerLevelsOptions) -> tuple[str, ...]:
    return ("mlp", "attention") if options.attention else ("mlp",)


def _decode(values: dict[str, Scalar], path: str, options: LayerLevelsOptions) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"mlp": [], "attention": []}
    for part in _parts(options):
        for layer in range(options.layers):
            level = values[f"{path}.{part}.{layer}"]
            assert isinstance(level, int)
            found[part].append(level / (options.levels - 1))
    return found


def _encode(item: Any, path: str, options: LayerLevelsOptions) -> dict[str, Scalar]:
    """Return the levels of ratios; where they are left open in every layer, all are equal."""
    given = {part: list(item.get(part, ())) for part in ("mlp", "attention")} if isinstance(item, dict) else None
    if given is None:
        raise ValueError(f"{item!r} is no mapping of ratios")
    if not any(given.values()):
        given = {part: [(options.levels // 2) / (options.levels - 1)] * options.layers for part in _parts(options)}
    values: dict[str, Scalar] = {}
    for part, ratios in given.items():
        if len(ratios) != (options.layers if part in _parts(options) else 0):
            raise ValueError(f"{part} is {len(ratios)} ratios, the space has others")
        for layer, ratio in enumerate(ratios):
            level = round(ratio * (options.levels - 1))
            if not 0 <= level < options.levels or level / (options.levels - 1) != ratio:
                raise ValueError(f"{part}.{layer} is {ratio:g}, which is none of {options.levels} levels from 0 to 1")
            values[f"{path}.{part}.{layer}"] = level
    return values


@DIMENSIONS.register(options=LayerLevelsOptions, decode=_decode, encode=_encode)
def parameters(path: str, options: LayerLevelsOptions) -> dict[str, Parameter]:
    """Return one level for each layer: ``<path>.mlp.0``, ..., ``<path>.attention.0``, ...

    Raises:
        ValueError: no layer at all.
    """
    if options.layers < 1:
        raise ValueError("must say how many layers the model has, such as {layers: 30}")
    names = [f"{path}.{part}.{layer}" for part in _parts(options) for layer in range(options.layers)]
    return {name: IntParameter(low=0, high=options.levels - 1) for name in names}
