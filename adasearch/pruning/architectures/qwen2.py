"""Qwen 2 and 2.5: query, key and value projections have biases."""

from __future__ import annotations

from adasearch.pruning.architectures._decoder import describe_decoder
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.registry import ARCHITECTURES
from adasearch.sections import UnitsConfig


@ARCHITECTURES.register(model_types=("qwen2",))
def describe(shape: ModelShape, units: UnitsConfig) -> ModelStructure:
    """Return what can be cut from a model of this family."""
    return describe_decoder(shape, units)
