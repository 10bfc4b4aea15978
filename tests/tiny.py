"""Tiny random models of every family (GQA on: 3 KV groups of 2 query heads), and a tokenizer made in memory."""

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from adasearch import models
from adasearch.pruning import architectures
from adasearch.pruning.plan import make_plan
from adasearch.sections import UnitsConfig

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mistral": MistralConfig}
FAMILIES = tuple(CONFIGS)
SPECIAL = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 256 + len(SPECIAL)


def tiny_config(family="llama", **changes):
    """Config of a model of about 12 000 parameters; Qwen2 states no head size, so its hidden size must divide."""
    numbers = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "qwen2":
        numbers["head_dim"] = 8
    return CONFIGS[family](**{**numbers, **changes})


def tiny_weights(config, dtype=torch.float32, seed=0):
    """Random weights, large enough that every unit matters; biases and norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in models.shape_of(config).shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        scaled = 1 + 0.1 * noise if "norm" in name else noise * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        weights[name] = scaled.to(dtype)
    return weights


def tiny_structure(config, attention="kv_group", mlp="channel"):
    """Structure of a config with the units asked for, and the units."""
    units = UnitsConfig(attention=attention, mlp=mlp)
    return architectures.describe(models.shape_of(config), units), units


def random_plan(structure, units, widths, seed=0, biases=()):
    """Plan that keeps random units."""
    generator = torch.Generator().manual_seed(seed)
    scores = {g.name: torch.rand(g.units, generator=generator) for g in structure.groups}
    return make_plan(structure, units, scores, widths, biases)


def tiny_tokenizer():
    """Tokenizer with one token per byte: any text goes in and comes out again."""
    letters = {char: i + len(SPECIAL) for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary = {token: i for i, token in enumerate(SPECIAL)} | letters
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def save_checkpoint(folder, family="llama", dtype=torch.float32, seed=0, **changes):
    """Write a tiny checkpoint (config, safetensors, tokenizer) and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **changes)
    config.dtype = dtype
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    save_file(tiny_weights(config, dtype, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
