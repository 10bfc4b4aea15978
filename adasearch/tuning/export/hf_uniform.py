"""Hugging Face folder of a stock class, whatever the widths: narrower layers are padded with units of zeros.

A padded channel has zero rows in gate and up and a zero column in down, a padded head zero rows in q, k and v and a
zero column in o: SiLU(0) · 0 = 0, and attention over values of zero is zero, so that the function stays what it was up
to the order of sums. What is padded costs parameters, bytes and time like everything else, and the card says how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch import loading
from adasearch.documents import Count, value
from adasearch.errors import ModelError
from adasearch.registry import EXPORT
from adasearch.tuning.export import ExportReport, Goods
from adasearch.tuning.export._files import (
    FileSize,
    LayerWidths,
    accepted,
    layer_widths,
    window,
    write_text_files,
    write_weights,
)
from adasearch.tuning.export._folder import Contents, publish

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_AS_LLAMA = frozenset({"mistral", "qwen2"})
"""Families that are Llama but for biases, where attention looks back without limit."""
_LIKE_BASE = frozenset({"model_type", "architectures", "auto_map", "per_layer_config", "absent_sublayers"})
_BIASES = {"attention_bias": "self_attn", "mlp_bias": "mlp"}


@value
class HfUniformOptions:
    """Settings of a padded Hugging Face folder.

    Args:
        multiple_of: channels of an MLP are padded to a multiple of it, as kernels like them.
        shard: greatest size of a weight file, such as ``500MB``.
    """

    multiple_of: Count = 1
    shard: FileSize = "5GB"

    @property
    def label(self) -> str:
        """Return what its folder is called after the name of the model."""
        return "hf_uniform"


def _targets(goods: Goods, widths: list[LayerWidths], multiple: int) -> Iterator[LayerWidths]:
    """Yield widths that hold every layer, the fewest heads first: not every number of heads is accepted by every class.

    The dense model's are among them, which its class accepts.
    """
    shape = goods.base.shape
    groups, repeats = (max(1, *(getattr(w, x) for w in widths)) for x in ("groups", "repeats"))
    channels = -(-max(1, *(w.channels for w in widths)) // multiple) * multiple
    pairs = [
        (g, r) for g in range(groups, shape.kv_heads + 1) for r in range(repeats, shape.heads // shape.kv_heads + 1)
    ]
    for g, r in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair)):
        yield LayerWidths(groups=g, repeats=r, channels=channels)


def _classes(goods: Goods) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield config classes that may describe the model, and what they are told beside the widths."""
    from transformers import LlamaConfig

    config = goods.base.config
    names = [name for name in goods.model.state_dict() if name.endswith(".bias")]
    biased = {key: any(f".{part}." in name for name in names) for key, part in _BIASES.items()}
    data = {key: item for key, item in config.to_dict().items() if key not in _LIKE_BASE}
    data |= {"dtype": goods.dtype, "head_dim": goods.base.shape.head_dim}
    yield type(config), data
    like_llama = goods.base.shape.family in _AS_LLAMA and window(config) is None
    for known in (type(config), LlamaConfig) if like_llama else (type(config),):
        default = known()
        yield known, {key: item for key, item in (data | biased).items() if hasattr(default, key)}


def _stock(goods: Goods, multiple: int) -> tuple[Any, LayerWidths, dict[str, tuple[int, ...]]]:
    """Return a stock config that holds the model, its widths, and the shapes of its parameters.

    Raises:
        ModelError: no stock class has a place for every parameter.
    """
    from adasearch import models

    widths = layer_widths(goods.model, goods.base.shape.head_dim)
    needed = {name for name, _ in goods.model.named_parameters()}
    lacking: set[str] = set()
    for config_class, data in _classes(goods):
        for target in _targets(goods, widths, multiple):
            config = accepted(config_class, {**data, **target.as_config()})
            if config is None:
                continue
            empty = models.empty_model(config)
            shapes = {name: tuple(p.shape) for name, p in empty.named_parameters()}
            if needed <= shapes.keys():
                config.architectures = [type(empty).__name__]
                return config, target, shapes
            lacking = needed - shapes.keys()
            break
    reason = f"it has no place for {min(lacking)}" if lacking else "it refuses the numbers of heads"
    raise ModelError(
        f"hf_uniform: a stock class must hold every parameter, that of {goods.base.shape.family} does not: {reason}; "
        "use the format hf, or compensation none"
    )


def _grown(tensor: Tensor, dim: int, small: tuple[int, ...], large: tuple[int, ...]) -> Tensor:
    """Return a tensor with zeros added: its dimension `dim`, a box of shape `small`, becomes one of shape `large`."""
    lead, tail = tensor.shape[:dim], tensor.shape[dim + 1 :]
    made = tensor.new_zeros(*lead, *large, *tail)
    made[(slice(None),) * dim + tuple(slice(size) for size in small)] = tensor.reshape(*lead, *small, *tail)
    return made.reshape(*lead, math.prod(large), *tail)


def _boxes(widths: LayerWidths, head_dim: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return for each linear layer which dimension of its weight is cut, and the box that it is laid out as."""
    queries, keys = (widths.groups, widths.repeats, head_dim), (widths.groups, head_dim)
    rows = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": (widths.channels,)}
    rows["up_proj"] = rows["gate_proj"]
    columns = {"o_proj": queries, "down_proj": (widths.channels,)}
    return {name: (0, box) for name, box in rows.items()} | {name: (1, box) for name, box in columns.items()}


def _padded(goods: Goods, target: LayerWidths, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the parameters of the stock class: the model's, zeros around them; norms of absent sublayers are 1."""
    model: nn.Module = goods.model
    own: dict[str, Tensor] = {name: x.detach() for name, x in model.named_parameters()}
    like = next(iter(own.values()))
    head_dim = goods.base.shape.head_dim
    widths = layer_widths(model, head_dim)
    goal = _boxes(target, head_dim)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = own.get(name)
        if tensor is None:
            made[name] = like.new_ones(shape) if "norm" in name else like.new_zeros(shape)
            continue
        linear = name.split(".")[-2]
        if linear in goal and ".layers." in name:
            dim, box = _boxes(widths[int(name.split(".")[2])], head_dim)[linear]
            if dim < tensor.dim():  # the bias of a layer that is cut at its input is as long as ever
                tensor = _grown(tensor, dim, box, goal[linear][1])
        made[name] = tensor
    return made


def open_model(folder: Path, device: str) -> PreTrainedModel:
    """Open `folder` with the stock class, as anybody does."""
    from transformers import AutoModelForCausalLM

    return loading.open_with(AutoModelForCausalLM, folder, dtype="auto", device=device, trust=False)


@EXPORT.register(options=HfUniformOptions, open=open_model)
def export(goods: Goods, folder: Path, options: HfUniformOptions, *, overwrite: bool = False) -> ExportReport:
    """Write a pruned model as a Hugging Face folder that a stock class of transformers opens.

    Raises:
        ModelError: no stock class has a place for every parameter (biases that compensation added), or as `publish`.
        StorageError: as `publish`.
    """
    config, target, shapes = _stock(goods, options.multiple_of)

    def write(draft: Path) -> Contents:
        state = _padded(goods, target, shapes)
        write_weights(state, draft, options.shard, tied=goods.base.shape.tied)
        write_text_files(config, goods.base, draft)
        parameters = sum(t.numel() for t in state.values())
        extra = parameters - goods.plan.parameters
        size = extra * goods.model.get_parameter("model.embed_tokens.weight").element_size()
        note = (
            f"Layers are padded with zeros to {target.groups * target.repeats} heads, {target.groups} KV heads and "
            f"{target.channels:,} channels, which changes no result: {extra:,} parameters ({size:,} bytes) more than "
            f"the plan's, {parameters:,} in all."
        )
        return Contents(layout="stock", as_read=goods.model, parameters=parameters, notes=(note,))

    return publish(goods, folder, "hf_uniform", write, overwrite=overwrite)
