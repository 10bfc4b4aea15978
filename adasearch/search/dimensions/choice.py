"""One of several values, without order: ``{choice: [16, 32]}``, ``{choice: [none, {type: lora, rank: 8}]}``."""

from __future__ import annotations

import json
from typing import Any

from adasearch.documents import plain, value
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import CategoricalParameter, Parameter, Scalar


@value
class ChoiceOptions:
    """The values to choose among, all different; scalars, lists or mappings."""

    choices: tuple[Any, ...] = ()


def _label(item: Any) -> Scalar:
    """Return what stands for `item` in the study: itself, or its JSON where it is no scalar."""
    return item if item is None or isinstance(item, Scalar) else json.dumps(plain(item), sort_keys=True)


def _decode(values: dict[str, Scalar], path: str, options: ChoiceOptions) -> Any:
    labels = [_label(item) for item in options.choices]
    return plain(options.choices[labels.index(values[path])])


def _encode(item: Any, path: str, options: ChoiceOptions) -> dict[str, Scalar]:
    for choice in options.choices:
        if plain(choice) == plain(item):
            return {path: _label(choice)}
    raise ValueError(f"{item!r} is not among {', '.join(repr(plain(c)) for c in options.choices)}")


@DIMENSIONS.register(options=ChoiceOptions, decode=_decode, encode=_encode)
def parameters(path: str, options: ChoiceOptions) -> dict[str, Parameter]:
    """Return the one parameter of a choice.

    Raises:
        ValueError: no value, or the same value twice.
    """
    labels = tuple(_label(item) for item in options.choices)
    if not labels:
        raise ValueError("must list at least one value")
    twice = [label for i, label in enumerate(labels) if label in labels[:i]]
    if twice:
        raise ValueError(f"must list different values, given {twice[0]!r} twice")
    return {path: CategoricalParameter(choices=labels)}
