"""What Llama and its relatives share: gated MLP, grouped-query attention, `model.layers.N`, one residual stream."""

from __future__ import annotations

import math

from adasearch.pruning.structure import Group, ModelShape, ModelStructure, Slice, priced
from adasearch.sections import UnitsConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_NORMS = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
"""What a sublayer reads through, and takes along when it leaves."""
_READS, _WRITES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def _stream_dim(parameter: str) -> int | None:
    """Return the dimension of a parameter that runs along the residual stream, None where none does."""
    *_, module, kind = parameter.split(".")
    if module in {"embed_tokens", "lm_head"} or (module in _READS and kind == "weight"):
        return 1
    return 0 if module in {*_NORMS.values(), "norm", *_WRITES} else None


def _rows(shape: ModelShape, module: str, block: int) -> tuple[Slice, ...]:
    """Return the slices of a projection whose output features belong to units: weight rows, bias if it has one."""
    names = (f"{module}.weight", f"{module}.bias")
    return tuple(Slice(parameter=name, dim=0, block=block) for name in names if name in shape.shapes)


def _columns(module: str, block: int) -> Slice:
    """Return the slice of a projection whose input features belong to units; its bias is the residual stream's."""
    return Slice(parameter=f"{module}.weight", dim=1, block=block)


def _mlp(shape: ModelShape, layer: int) -> Group:
    name = f"model.layers.{layer}.mlp"
    slices = (
        *_rows(shape, f"{name}.gate_proj", 1),
        *_rows(shape, f"{name}.up_proj", 1),
        _columns(f"{name}.down_proj", 1),
    )
    return Group(
        name=name,
        layer=layer,
        kind="mlp",
        unit="channel",
        units=shape.intermediate,
        partitions=1,
        slices=slices,
        output=f"{name}.down_proj",
    )


def _attention(shape: ModelShape, layer: int, unit: str) -> Group:
    """Return the attention group of a layer.

    With one query head per KV head the two units are the same thing, and a head may go alone: it is described as a
    KV group, whose partition is the whole group.
    """
    name = f"model.layers.{layer}.self_attn"
    if unit == "head" and shape.heads > shape.kv_heads:
        units, partitions, block = shape.heads, shape.kv_heads, shape.head_dim
        keys: tuple[Slice, ...] = ()
    else:
        unit, units, partitions = "kv_group", shape.kv_heads, 1
        block = shape.heads // shape.kv_heads * shape.head_dim
        keys = (*_rows(shape, f"{name}.k_proj", shape.head_dim), *_rows(shape, f"{name}.v_proj", shape.head_dim))
    slices = (*_rows(shape, f"{name}.q_proj", block), *keys, _columns(f"{name}.o_proj", block))
    return Group(
        name=name,
        layer=layer,
        kind="attention",
        unit=unit,
        units=units,
        partitions=partitions,
        slices=slices,
        output=f"{name}.o_proj",
    )


def _stock_widths(shape: ModelShape, groups: list[Group], *, heads_divide_hidden: bool) -> dict[str, tuple[int, ...]]:
    """Return the attention widths at which the number of query heads divides the hidden size, where that matters."""
    attention = next((g for g in groups if g.kind == "attention"), None)
    if attention is None or not heads_divide_hidden:
        return {}
    heads = shape.heads // attention.width
    return {"attention": tuple(w for w in range(1, attention.width) if shape.hidden % (w * heads) == 0)}


def describe_decoder(shape: ModelShape, units: UnitsConfig, *, heads_divide_hidden: bool = False) -> ModelStructure:
    """Return the structure of a Llama-like decoder; norms over single heads, as in Qwen3, are shared and stay whole.

    Args:
        shape: the numbers of the model's config.
        units: what can go.
        heads_divide_hidden: the family's stock class accepts only numbers of query heads that divide the hidden size.
    """
    groups: list[Group] = []
    for layer in range(shape.layers):
        # A sublayer that an outline took away has no parameters, and nothing that could be cut.
        if units.attention != "none" and f"model.layers.{layer}.self_attn.o_proj.weight" in shape.shapes:
            groups.append(priced(shape, _attention(shape, layer, units.attention)))
        if units.mlp != "none" and f"model.layers.{layer}.mlp.down_proj.weight" in shape.shapes:
            groups.append(priced(shape, _mlp(shape, layer)))
    embeddings = {
        name: dims for name, dims in shape.shapes.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }
    return ModelStructure(
        family=shape.family,
        layers=shape.layers,
        groups=tuple(groups),
        parameters=sum(math.prod(dims) for dims in shape.shapes.values()),
        embedding_parameters=sum(math.prod(dims) for dims in embeddings.values()),
        output_biases={g.output: 0 if f"{g.output}.bias" in shape.shapes else shape.hidden for g in groups},
        lora_targets=PROJECTIONS,
        stream=tuple(
            Slice(parameter=name, dim=dim, block=1) for name in shape.shapes if (dim := _stream_dim(name)) is not None
        ),
        tokens=tuple(Slice(parameter=name, dim=0, block=1) for name in embeddings),
        norms={
            f"model.layers.{layer}.{part}": f"model.layers.{layer}.{norm}.weight"
            for layer in range(shape.layers)
            for part, norm in _NORMS.items()
        },
        stock_widths=_stock_widths(shape, groups, heads_divide_hidden=heads_divide_hidden),
    )
