"""Apply a plan: a smaller model of the stock class, its layers as wide as the plan says. Base weights stay."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adasearch import models
from adasearch.pruning.plan import PruningPlan, check_plan
from adasearch.pruning.structure import Group, ModelStructure, Slice


def _elements(keep: tuple[int, ...], block: int) -> Tensor:
    """Return the indices along a sliced dimension that kept units own (`len(keep) * block`-vector)."""
    return (torch.tensor(keep)[:, None] * block + torch.arange(block)).reshape(-1)


def _slices(structure: ModelStructure, plan: PruningPlan) -> dict[str, tuple[Slice, tuple[int, ...]]]:
    """Return the slice and the kept units of every parameter that the plan makes smaller."""
    cut = [g for g in structure.groups if len(plan.keep[g.name]) < g.units]
    return {s.parameter: (s, plan.keep[g.name]) for g in cut for s in g.slices}


def uniform_config(config: Any, structure: ModelStructure, plan: PruningPlan) -> Any:
    """Return a copy of `config` that states the widths of the cut model where they are equal in all layers.

    Where layers differ no stock config can tell the truth: the dense numbers stay, and the plan tells the widths.
    """
    config = copy.deepcopy(config)
    heads, groups = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    widths = plan.widths(structure)
    by_unit: dict[str, list[int]] = {}
    for group in structure.groups:
        by_unit.setdefault(group.unit, []).append(widths[group.name])
    equal = {
        unit: found[0] for unit, found in by_unit.items() if len(found) == structure.layers and len(set(found)) == 1
    }
    if "channel" in equal:
        config.intermediate_size = equal["channel"]
    if "kv_group" in equal:
        config.num_key_value_heads, config.num_attention_heads = equal["kv_group"], heads // groups * equal["kv_group"]
    if "head" in equal:
        config.num_attention_heads = groups * equal["head"]
    return config


def _resize(model: nn.Module, name: str, sizes: Mapping[int, int], *, bias: bool) -> None:
    """Replace a linear layer by one without content of other sizes (`sizes`: dimension of the weight -> length)."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear), f"{name} must be a linear layer, is {type(old).__name__}"
    rows, columns = sizes.get(0, old.out_features), sizes.get(1, old.in_features)
    bias = bias or old.bias is not None
    model.set_submodule(name, nn.Linear(columns, rows, bias=bias, device="meta", dtype=old.weight.dtype))


def _note_width(model: nn.Module, group: Group, width: int) -> None:
    """Set the numbers that the module of a sublayer keeps of its own width."""
    module = model.get_submodule(group.name)
    if group.unit == "head":
        module.num_key_value_groups = width  # type: ignore[assignment]
    if group.kind == "mlp":
        module.intermediate_size = width  # type: ignore[assignment]


def skeleton(config: Any, structure: ModelStructure, plan: PruningPlan) -> nn.Module:
    """Return the cut model without content: every parameter on the meta device and of its final shape.

    Raises:
        ModelError: the plan is not one for this structure.
    """
    check_plan(plan, structure)
    model = models.empty_model(config)
    sizes: dict[str, dict[int, int]] = {name: {} for name in structure.added(plan.biases)}
    for parameter, (piece, keep) in _slices(structure, plan).items():
        module, _, kind = parameter.rpartition(".")
        if kind == "weight":
            sizes.setdefault(module, {})[piece.dim] = len(keep) * piece.block
    for name, lengths in sizes.items():
        _resize(model, name, lengths, bias=name in plan.biases)
    for name, width in plan.widths(structure).items():
        _note_width(model, structure.group(name), width)
    told = uniform_config(config, structure, plan)
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        setattr(model.config, key, getattr(told, key))
    return model


def _new_biases(structure: ModelStructure, plan: PruningPlan, like: Tensor) -> dict[str, Tensor]:
    return {f"{name}.bias": like.new_zeros(size) for name, size in structure.added(plan.biases).items()}


def cut(
    config: Any,
    weights: Mapping[str, Tensor],
    structure: ModelStructure,
    plan: PruningPlan,
    whole: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return the cut model: copies of what stays, added biases zero, in the format and on the device of `weights`.

    Args:
        config: transformers config of the dense model; the model gets a copy.
        weights: parameters of the dense model by name, tied ones once; never written to.
        structure: what can be cut, with the units of the plan.
        plan: what stays.
        whole: equal weights that the model may have for its own, for parameters that stay as they are (see
            `models.own_weights`); None copies them.

    Raises:
        ModelError: the plan or the weights do not fit the structure.
    """
    model = skeleton(config, structure, plan)
    slices = _slices(structure, plan)
    pieces: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in slices:
            piece, keep = slices[name]
            pieces[name] = weight.detach().index_select(piece.dim, _elements(keep, piece.block).to(weight.device))
        else:
            pieces[name] = weight.detach().clone() if whole is None else whole[name]
    like = next(iter(weights.values()))
    return models.assemble(model, pieces | _new_biases(structure, plan, like))


def narrow(model: nn.Module, structure: ModelStructure, plan: PruningPlan) -> None:
    """Cut the groups of `structure` from a model in place, those that `plan` makes smaller; the others stay dense.

    Parameters are replaced by copies of what stays and never written to: they may be the weights of a base. Output
    projections that are cut get their bias, zero where they had none, as a tensor of their own.

    Args:
        model: its groups that are named here are dense.
        structure: all groups of the model, or some of them.
        plan: what stays of these.
    """
    slices = _slices(structure, plan)
    with torch.no_grad():
        for parameter, (piece, keep) in slices.items():
            module, _, kind = parameter.rpartition(".")
            old, owner = model.get_parameter(parameter), model.get_submodule(module)
            new = old.index_select(piece.dim, _elements(keep, piece.block).to(old.device))
            setattr(owner, kind, nn.Parameter(new, requires_grad=False))
            setattr(owner, "in_features" if piece.dim else "out_features", new.shape[piece.dim])
    for group in structure.groups:
        if f"{group.output}.weight" not in slices:
            continue
        _note_width(model, group, len(plan.keep[group.name]) // group.partitions)
        output = model.get_submodule(group.output)
        assert isinstance(output.weight, Tensor)
        if group.output in plan.biases or output.bias is not None:
            bias = output.weight.new_zeros(len(output.weight)) if output.bias is None else output.bias.detach().clone()  # type: ignore[operator]
            output.bias = nn.Parameter(bias, requires_grad=False)


def zeroed(config: Any, weights: Mapping[str, Tensor], structure: ModelStructure, plan: PruningPlan) -> nn.Module:
    """Return a dense copy of the model in which the units that the plan removes add nothing to the residual stream.

    It computes the same function as `cut`: the golden property of this house, and a way to look at a cut in place.
    """
    check_plan(plan, structure)
    model = models.empty_model(config)
    for name in structure.added(plan.biases):
        _resize(model, name, {}, bias=True)
    pieces = {name: weight.detach().clone() for name, weight in weights.items()}
    for group in structure.groups:
        gone = tuple(sorted(set(range(group.units)) - set(plan.keep[group.name])))
        if gone:
            output = pieces[f"{group.output}.weight"]
            output[:, _elements(gone, group.output_block).to(output.device)] = 0
    like = next(iter(weights.values()))
    return models.assemble(model, pieces | _new_biases(structure, plan, like))
