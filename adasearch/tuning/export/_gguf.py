"""How llama.cpp stores the four families: names, rows of rotated heads, and which of its graphs reads which widths.

Its graph ``deci`` takes heads, KV heads and channels of every layer from arrays, with biases anywhere and layers that
have no attention; it is Llama otherwise, so Llama, Mistral and Qwen2 (Llama with biases) can all be read by it. Qwen3
normalises queries and keys: the graph ``openelm`` does that with widths per layer, where the output layer is the
embedding and there are no biases. Equal widths are written for the graph of the family itself, which other readers of
GGUF know. (llama.cpp, ``src/models/{llama,deci,qwen2,qwen3,openelm}.cpp``.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adasearch.errors import ModelError
from adasearch.loading import GGUF
from adasearch.tuning.export._files import LayerWidths, layer_widths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from adasearch.tuning.export import Goods

FAMILY = "adasearch.family"
"""Field with the family of transformers that the model is of: the graph does not tell."""
WHOLE_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED = "attn_qkv"
NEIGHBOURS = frozenset({"llama", "deci"})
"""Graphs that rotate neighbouring rows of a head, where transformers rotates row i with row i + d/2.

They are also the ones that read factors of the frequencies.
"""
_PER_LAYER = frozenset({"deci", "openelm"})
_STAND_IN = 32
"""Channels of an MLP of zeros that stands where there is none: one block of q8_0."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model is stored.

    Args:
        graph: which of llama.cpp's graphs reads it (``general.architecture``).
        widths: of each layer, sublayers that stand in for absent ones included; 0 groups where there is no attention.
        head_dim: rows of a head.
        hidden: size of the residual stream.
    """

    graph: str
    widths: tuple[LayerWidths, ...]
    head_dim: int
    hidden: int

    @property
    def heads(self) -> int | list[int]:
        """Return the query heads, of each layer where the graph reads arrays."""
        return self._numbers([w.groups * w.repeats for w in self.widths])

    @property
    def groups(self) -> int | list[int]:
        """Return the KV heads likewise."""
        return self._numbers([w.groups for w in self.widths])

    @property
    def channels(self) -> int | list[int]:
        """Return the channels of the MLPs likewise."""
        return self._numbers([w.channels for w in self.widths])

    def _numbers(self, found: list[int]) -> int | list[int]:
        return found if self.graph in _PER_LAYER else found[0]


def _own_graph(family: str, widths: Sequence[LayerWidths], goods: Goods, *, added: bool) -> str | None:
    """Return the graph of the family itself where it can read the model.

    Qwen2's takes as many rows of queries as the residual stream has; neither Qwen's knows biases of its own making.
    """
    if any(w != widths[0] for w in widths) or not (widths[0].groups and widths[0].channels):
        return None
    shape = goods.base.shape
    if family in {"llama", "mistral"}:
        return "llama"
    if family == "qwen2" and (added or widths[0].groups * widths[0].repeats * shape.head_dim != shape.hidden):
        return None
    return None if added else family


def layout_of(goods: Goods) -> Layout:
    """Return how a model is stored.

    Raises:
        ModelError: llama.cpp has no graph for it.
    """
    shape, family = goods.base.shape, goods.base.shape.family
    widths = layer_widths(goods.model, shape.head_dim)
    names = set(goods.model.state_dict())
    added = any(n.endswith(".bias") and n not in shape.shapes for n in names)
    graph = _own_graph(family, widths, goods, added=added)
    if graph is None and family in {"llama", "mistral", "qwen2"}:
        graph = "deci"
    elif graph is None and family == "qwen3" and shape.tied and not any(n.endswith(".bias") for n in names):
        graph = "openelm"
    if graph is None:
        raise ModelError(
            f"gguf: llama.cpp reads widths per layer of {family} only where the embedding is the output layer and no "
            "layer has a bias (compensation none, tied embeddings); use equal widths (budget.uniform) or another format"
        )
    return Layout(
        graph=graph,
        widths=tuple(_stood_in(w, graph, index) for index, w in enumerate(widths)),
        head_dim=shape.head_dim,
        hidden=shape.hidden,
    )


def _stood_in(widths: LayerWidths, graph: str, index: int) -> LayerWidths:
    """Return the widths of a layer with zeros for sublayers that llama.cpp cannot leave out.

    ``deci`` can leave out attention, but takes the size of a head from layer 0; without an MLP it drops the attention
    of that layer too.
    """
    gone = not widths.groups and (graph != "deci" or index == 0)
    groups, repeats = (1, 1) if gone else (widths.groups, widths.repeats)
    return LayerWidths(groups=groups, repeats=repeats, channels=widths.channels or _STAND_IN)


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Return the rows of heads (H · d first) so that the rows i and i + d/2 of each become 2 i and 2 i + 1."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _halved(rows: Tensor, heads: int) -> Tensor:
    """Undo `_paired`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _stand_in(part: str, widths: LayerWidths, layout: Layout, like: Tensor) -> dict[str, Tensor]:
    """Return an attention or an MLP that adds nothing, with the norm before it, by name within the layer."""
    hidden, rows = layout.hidden, layout.head_dim * widths.groups
    queries = rows * widths.repeats
    if part == "mlp":
        norms = {"post_attention_layernorm": hidden}
        shapes = {"gate": (widths.channels, hidden), "up": (widths.channels, hidden), "down": (hidden, widths.channels)}
    else:
        norms = {"input_layernorm": hidden}
        if layout.graph == "openelm":
            norms |= {"self_attn.q_norm": layout.head_dim, "self_attn.k_norm": layout.head_dim}
        shapes = {"q": (queries, hidden), "k": (rows, hidden), "v": (rows, hidden), "o": (hidden, queries)}
    made = {f"{part}.{name}_proj.weight": like.new_zeros(shape) for name, shape in shapes.items()}
    return made | {f"{name}.weight": like.new_ones(size) for name, size in norms.items()}


def _layer_tensors(layer: nn.Module, index: int, layout: Layout, like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a layer under the names of the file, stand-ins included."""
    import torch

    widths = layout.widths[index]
    found: dict[str, Tensor] = {name: p.detach() for name, p in layer.named_parameters()}
    for part, wanted in (("self_attn", widths.groups), ("mlp", widths.channels)):
        if wanted and not any(name.startswith(f"{part}.") for name in found):
            found |= _stand_in(part, widths, layout, like)
    if layout.graph in NEIGHBOURS:
        for name, heads in (("q_proj", widths.groups * widths.repeats), ("k_proj", widths.groups)):
            for full in {f"self_attn.{name}.weight", f"self_attn.{name}.bias"} & found.keys():
                found[full] = _paired(found[full], heads)
    if layout.graph == "openelm":
        fused = torch.cat([found.pop(f"self_attn.{x}_proj.weight") for x in "qkv"])
        yield f"blk.{index}.{_FUSED}.weight", fused
    for name, tensor in found.items():
        module, _, kind = name.rpartition(".")
        yield f"blk.{index}.{LAYER_NAMES[module]}.{kind}", tensor


def tensors_of(model: Any, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model as the file holds it, under its name there."""
    for name, stored in WHOLE_NAMES.items():
        if name != "lm_head.weight" or model.lm_head.weight is not model.model.embed_tokens.weight:
            yield stored, model.get_parameter(name).detach()
    for index, layer in enumerate(model.model.layers):
        yield from _layer_tensors(layer, index, layout, model.model.embed_tokens.weight)


def _fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def _listed(given: int | list[int], layers: int) -> list[int]:
    return list(given) if isinstance(given, list) else [given] * layers


def _read_config(fields: dict[str, Any], names: set[str], vocabulary: int) -> dict[str, Any]:
    """Return the config of the family, its widths per layer, that the fields and tensors of a file describe."""
    graph = fields["general.architecture"]

    def field(key: str) -> Any:
        return fields[f"{graph}.{key}"]

    layers = field("block_count")
    heads = _listed(field("attention.head_count"), layers)
    groups = _listed(field("attention.head_count_kv"), layers)
    channels = _listed(field("feed_forward_length"), layers)
    turned = {v: k for k, v in LAYER_NAMES.items()}
    biases = [m for m in map(_BLOCK.fullmatch, sorted(names)) if m and m[3] == "bias"]
    per_layer = {
        i: {"num_attention_heads": max(1, h), "num_key_value_heads": max(1, g), "intermediate_size": c}
        for i, (h, g, c) in enumerate(zip(heads, groups, channels, strict=True))
    }
    return {
        "vocab_size": vocabulary,
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": max(heads),
        "num_key_value_heads": max(groups),
        "intermediate_size": max(channels),
        "head_dim": field("attention.key_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "sliding_window": None,  # the context ends where a window would begin to matter
        "rope_parameters": {"rope_type": "default", "rope_theta": field("rope.freq_base")},
        "tie_word_embeddings": "output.weight" not in names,
        "extra_biases": [f"model.layers.{m[1]}.{turned[m[2]]}" for m in biases],
        "absent_sublayers": [f"model.layers.{i}.self_attn" for i, h in enumerate(heads) if not h],
        "per_layer_config": per_layer,
    }


def _original(name: str, tensor: Tensor, config: dict[str, Any], graph: str) -> Iterator[tuple[str, Tensor]]:
    """Yield what a tensor of the file is in transformers, by name."""
    whole = {stored: own for own, stored in WHOLE_NAMES.items()}
    if name in whole:
        yield whole[name], tensor
        return
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise ModelError(f"gguf: a tensor must be one of the family's, given {name!r}")
    index, stored, kind = match.groups()
    widths, prefix = config["per_layer_config"][int(index)], f"model.layers.{index}"
    heads, groups = widths["num_attention_heads"], widths["num_key_value_heads"]
    if stored == _FUSED:
        rows = [n * config["head_dim"] for n in (heads, groups, groups)]
        ends = itertools.accumulate(rows)
        parts = (tensor[end - size : end] for size, end in zip(rows, ends, strict=True))
        yield from zip((f"{prefix}.self_attn.{x}_proj.{kind}" for x in "qkv"), parts, strict=True)
        return
    own = {stored: own for own, stored in LAYER_NAMES.items()}[stored]
    if graph in NEIGHBOURS and stored in {"attn_q", "attn_k"}:
        tensor = _halved(tensor, heads if stored == "attn_q" else groups)
    yield f"{prefix}.{own}.{kind}", tensor


def open_model(folder: Path, device: str) -> PreTrainedModel:
    """Return the model in the GGUF file of an export, in float32, its fields and tensors read by the `gguf` package.

    Raises:
        ModelError: the file is damaged or holds something else.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    from adasearch import models
    from adasearch.modeling_adasearch import MODELS

    path = folder / GGUF
    try:
        reader: Any = GGUFReader(path)
        fields = _fields(reader)
        stored = {t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
        factors = stored.pop("rope_freqs.weight", None)
        config = _read_config(fields, set(stored), len(stored["token_embd.weight"]))
        graph, model_class = fields["general.architecture"], cast("Any", MODELS[fields[FAMILY]])
        pairs = [pair for name, tensor in stored.items() for pair in _original(name, tensor, config, graph)]
    except (OSError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{path}: cannot be opened: {' '.join(str(error).split())[:500]}") from error
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    opened: Any = models.assemble(model, dict(pairs))
    if factors is not None:
        opened.model.rotary_emb.inv_freq /= factors
    return cast("PreTrainedModel", opened.to(device))
