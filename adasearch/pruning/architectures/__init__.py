"""Model families, one file each, named after the ``model_type`` of their config.

An entry has the signature ``describe(shape: ModelShape, units: UnitsConfig) -> ModelStructure`` and the fact
``model_types``, the strings that it answers to. It lists the coupled groups; it sees no weights.
"""

from __future__ import annotations

from adasearch.errors import ModelError
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.registry import ARCHITECTURES
from adasearch.sections import UnitsConfig


def supported() -> tuple[str, ...]:
    """Return the ``model_type`` of every family that can be cut."""
    return tuple(sorted(t for name in ARCHITECTURES.names() for t in ARCHITECTURES.get(name).facts["model_types"]))


def describe(shape: ModelShape, units: UnitsConfig) -> ModelStructure:
    """Return what can be cut from a model of this shape.

    Raises:
        ModelError: its family is not supported; the message names those that are.
    """
    for name in ARCHITECTURES.names():
        entry = ARCHITECTURES.get(name)
        if shape.family in entry.facts["model_types"]:
            structure: ModelStructure = entry.function(shape, units)
            return structure
    raise ModelError(f"model family must be one of {', '.join(supported())}, given {shape.family!r}")
