"""A language model whose layers differ in width: the stock transformers class with layers built from their own config.

This file is the one that adasearch writes beside a model as ``modeling_adasearch.py``; it needs transformers >= 5.23
and nothing else. ``config.json`` holds in `per_layer_config` the `num_attention_heads`, `num_key_value_heads` and
`intermediate_size` of every layer (the global values are those of the dense model), in `extra_biases` the names of
the linear layers that gained a bias, and in `absent_sublayers` the attention and MLP sublayers that are gone.
Everything else, forward pass and cache included, is the stock code.
"""

# mypy: disable-error-code="no-untyped-call, call-arg, misc"
from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FILE_NAME = "modeling_adasearch.py"
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


class _Absent(nn.Module):
    """Stands where a sublayer was, and adds nothing to the residual stream."""

    absent = True


class AbsentAttention(_Absent):
    """No attention. The cache learns how many tokens went by, since it counts them in the first layer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Return zeros, and no attention weights."""
        cache = kwargs.get("past_key_values")
        if cache is not None:
            nothing = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class AbsentMlp(_Absent):
    """No MLP."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden_states)


def leave_out(model: nn.Module, names: Any) -> None:
    """Take sublayers (module paths such as ``model.layers.3.mlp``) out of a model, with the norms that they read."""
    for name in names:
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".self_attn"):
            layer.self_attn, layer.input_layernorm = AbsentAttention(layer.self_attn.layer_idx), nn.Identity()
        else:
            layer.mlp, layer.post_attention_layernorm = AbsentMlp(), nn.Identity()


class _PerLayerConfig:
    """What the configs share: a model type of their own, so that no stock class takes the folder for a dense model."""

    def validate_architecture(self) -> None:
        """Check every layer: its query heads must divide evenly among its KV heads."""
        for index, layer in enumerate(self.per_layer_config):  # type: ignore[attr-defined]
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if heads < 1 or groups < 1 or heads % groups:
                raise ValueError(f"layer {index}: {heads} query heads must be a multiple of {groups} KV heads")


@strict  # again, or the validator of the stock class would stay in force
class AdaSearchLlamaConfig(_PerLayerConfig, LlamaConfig):
    """Llama with widths per layer."""

    model_type = "adasearch_llama"


@strict
class AdaSearchMistralConfig(_PerLayerConfig, MistralConfig):
    """Mistral with widths per layer."""

    model_type = "adasearch_mistral"


@strict
class AdaSearchQwen2Config(_PerLayerConfig, Qwen2Config):
    """Qwen2 with widths per layer."""

    model_type = "adasearch_qwen2"


@strict
class AdaSearchQwen3Config(_PerLayerConfig, Qwen3Config):
    """Qwen3 with widths per layer."""

    model_type = "adasearch_qwen3"


class _PerLayerWidths:
    """What the models share: the decoder layers are built once more, each from the config of its own index."""

    def __init__(self, config: Any) -> None:
        overrides = config.to_dict().get("per_layer_config", {})
        # The stock constructor reads global widths, which a config with overrides refuses to give.
        config.per_layer_config = None
        try:
            super().__init__(config)
        finally:
            config.per_layer_config = overrides
        decoder: Any = self.model  # type: ignore[attr-defined]
        layer_class = type(decoder.layers[0])
        decoder.layers = nn.ModuleList(layer_class(layer, index) for index, layer in enumerate(config.per_layer_config))
        for module in decoder.layers.modules():
            if hasattr(module, "config"):
                module.config = config  # one config for all, so that a later change of attention kernel reaches them
        leave_out(self, getattr(config, "absent_sublayers", None) or ())  # type: ignore[arg-type]
        for name in getattr(config, "extra_biases", None) or ():
            linear = self.get_submodule(name)  # type: ignore[attr-defined]
            linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
        self.post_init()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as transformers does, and this file with it, so that the copy opens like the original."""
        super().save_pretrained(save_directory, **kwargs)
        target = Path(save_directory) / FILE_NAME
        if not target.exists():
            shutil.copyfile(__file__, target)


class AdaSearchLlamaForCausalLM(_PerLayerWidths, LlamaForCausalLM):
    """Llama with widths per layer."""

    config_class = AdaSearchLlamaConfig


class AdaSearchMistralForCausalLM(_PerLayerWidths, MistralForCausalLM):
    """Mistral with widths per layer."""

    config_class = AdaSearchMistralConfig


class AdaSearchQwen2ForCausalLM(_PerLayerWidths, Qwen2ForCausalLM):
    """Qwen2 with widths per layer."""

    config_class = AdaSearchQwen2Config


class AdaSearchQwen3ForCausalLM(_PerLayerWidths, Qwen3ForCausalLM):
    """Qwen3 with widths per layer."""

    config_class = AdaSearchQwen3Config


MODELS = {
    "llama": AdaSearchLlamaForCausalLM,
    "mistral": AdaSearchMistralForCausalLM,
    "qwen2": AdaSearchQwen2ForCausalLM,
    "qwen3": AdaSearchQwen3ForCausalLM,
}
