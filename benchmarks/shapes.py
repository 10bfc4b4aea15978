"""Checkpoints of a model's shape with random weights: for speed alone, where no such model is at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from adasearch import data

_SPECIAL = ("<pad>", "<s>", "</s>")
_COMMON = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SHAPES: Mapping[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}
"""Llama 2 of seven billion parameters (arXiv 2307.09288), and one that shows within a second that the path works."""


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocabulary` tokens, trained on the text that CPython ships."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    texts = [text for corpus in ("pydoc", "stdlib") for text in data.documents(corpus, "fit")]
    core.train_from_iterator(texts, trainer)
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos)


def write_checkpoint(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device, folder: Path) -> Path:
    """Return a checkpoint folder below `folder` with random weights, drawn on the device; kept for the next call.

    Args:
        shape: a name of `SHAPES`.
        layers: in place of the shape's own number.
        dtype: of the weights.
        device: where the weights are drawn, so that seven billion of them take seconds.
        folder: holds one folder per shape, number of layers and dtype.
    """
    fields = {**SHAPES[shape], **_COMMON, "tie_word_embeddings": False}
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    target = folder / f"{shape}-{fields['num_hidden_layers']}-{str(dtype).removeprefix('torch.')}"
    if (target / "complete").is_file():
        return target
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**fields), dtype=dtype)
    model.save_pretrained(target)
    make_tokenizer(fields["vocab_size"]).save_pretrained(target)
    (target / "complete").touch()
    return target
