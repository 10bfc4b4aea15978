"""Apply an outline: a smaller model of the same family, whose weights are slices of the dense one's."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import torch
from torch import Tensor

from adasearch import models, tokenization
from adasearch.models import BaseModel
from adasearch.pruning import vocabulary
from adasearch.pruning.structure import ModelStructure, Outline


def config_of(config: Any, outline: Outline) -> Any:
    """Return a copy of the config of a dense model that describes what an outline leaves of it, tokens aside."""
    found = copy.deepcopy(config)
    found.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = outline.layers(config.num_hidden_layers)
    found.absent_sublayers = list(outline.skipped(config.num_hidden_layers))
    found.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        found.layer_types = [config.layer_types[i] for i in layers]
    if outline.hidden is not None:
        found.hidden_size = len(outline.hidden)
    return found


def outlined(base: BaseModel, structure: ModelStructure, outline: Outline) -> BaseModel:
    """Return the model that an outline leaves: what stays whole is shared with `base`, the rest is copied.

    Args:
        base: the dense model.
        structure: of the same.
        outline: what stays.

    Raises:
        ConfigError: the tokenizer is of a kind whose vocabulary cannot be cut.
        ModelError: the family refuses the smaller sizes.
    """
    if outline.whole:
        return base
    config, tokenizer = config_of(base.config, outline), base.tokenizer
    if outline.tokens is not None:
        data = vocabulary.shrink(tokenization.tokenizer_json(tokenizer), outline.tokens)
        tokenizer = tokenization.with_tokenizer_json(tokenizer, data)
        ids = vocabulary.new_ids(outline.tokens)
        config = tokenization.config_with_vocabulary(config, ids, len(outline.tokens))
    shape = models.shape_of(config)
    number = base.shape.layers
    weights = {name: _piece(base, structure, outline, outline.dense_name(name, number)) for name in shape.shapes}
    return dataclasses.replace(base, config=config, tokenizer=tokenizer, shape=shape, weights=weights, outline=outline)


def generation_config(base: BaseModel) -> dict[str, Any]:
    """Return what the checkpoint's ``generation_config.json`` holds, its tokens those of `base`; {} without one."""
    try:
        data: dict[str, Any] = json.loads((base.folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kept = base.outline.tokens
    return data if kept is None else tokenization.remapped_ids(data, vocabulary.new_ids(kept))


def named_tokens(base: BaseModel) -> frozenset[int]:
    """Return the tokens that the model's configs name, which stay whatever their use."""
    return tokenization.named_ids(base.config.to_dict()) | tokenization.named_ids(generation_config(base))


def _piece(base: BaseModel, structure: ModelStructure, outline: Outline, name: str) -> Tensor:
    weight = base.weights[name]
    for pieces, stays in ((structure.stream, outline.hidden), (structure.tokens, outline.tokens)):
        for piece in pieces if stays is not None else ():
            if piece.parameter == name:
                weight = weight.index_select(piece.dim, torch.tensor(stays, device=weight.device))
    return weight
