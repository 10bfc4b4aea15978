"""Mistral: Llama with sliding-window attention, which cutting heads does not touch."""

from __future__ import annotations

from adasearch.pruning.architectures._decoder import describe_decoder
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.registry import ARCHITECTURES
from adasearch.sections import UnitsConfig


@ARCHITECTURES.register(model_types=("mistral",))
def describe(shape: ModelShape, units: UnitsConfig) -> ModelStructure:
    """Return what can be cut from a model of this family."""
    return describe_decoder(shape, units)
