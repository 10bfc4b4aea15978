"""Llama 1 to 3, SmolLM2, TinyLlama and others of their layout, biases in attention and MLP included."""

from __future__ import annotations

from adasearch.pruning.architectures._decoder import describe_decoder
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.registry import ARCHITECTURES
from adasearch.sections import UnitsConfig


@ARCHITECTURES.register(model_types=("llama",))
def describe(shape: ModelShape, units: UnitsConfig) -> ModelStructure:
    """Return what can be cut from a model of this family."""
    return describe_decoder(shape, units, heads_divide_hidden=True)  # transformers' LlamaConfig refuses others
