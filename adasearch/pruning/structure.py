"""What can be cut from a model, as data: coupled groups of parameter slices, and every count in closed form.

A *unit* is the smallest thing that goes as a whole (an MLP channel, a KV group, a query head). A *group* holds the
units of one sublayer; all slices of a unit must go together. Nothing here needs weights.

Shape letters: U units of a group, G partitions of a group, D hidden size, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from adasearch.documents import value


@value
class ModelShape:
    """The numbers of a model's config that its structure follows from.

    Args:
        parameters: number of elements of every parameter by full name, tied ones counted once.
        shapes: the shape of every parameter by full name.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    shapes: dict[str, tuple[int, ...]]


@value
class Slice:
    """Part of a parameter that belongs to units: u owns indices [u * block, (u + 1) * block) of dimension `dim`."""

    parameter: str
    dim: int
    block: int


@value
class Group:
    """The units of one sublayer.

    Args:
        name: module path of the sublayer, such as ``model.layers.3.mlp``.
        layer: index of the layer, from 0.
        kind: ``mlp`` or ``attention``.
        unit: ``channel``, ``kv_group`` or ``head``.
        units: number of units U.
        partitions: number of equal, contiguous parts G of the units that must keep equally many (query heads of a
            KV group); 1 where any subset of the units will do.
        slices: what each unit owns.
        output: name of the projection (module path) whose input features are the units' activations, unit by unit.
        unit_cost: number of parameters of one unit, counted by `priced`.
    """

    name: str
    layer: int
    kind: str
    unit: str
    units: int
    partitions: int
    slices: tuple[Slice, ...]
    output: str
    unit_cost: int = 0

    @property
    def width(self) -> int:
        """Return the dense width: units per partition. A cut keeps between 1 and this many of each partition."""
        return self.units // self.partitions

    @property
    def step_cost(self) -> int:
        """Return the number of parameters by which the model shrinks when the width falls by one."""
        return self.unit_cost * self.partitions

    @property
    def output_block(self) -> int:
        """Return the number of input features of `output` that one unit owns."""
        return next(s.block for s in self.slices if s.parameter == f"{self.output}.weight")


@value
class Outline:
    """What stays of a model besides the widths of its sublayers; without anything said all of it does.

    A model cut to an outline is an ordinary smaller model: the layers that are left are counted anew, and a sublayer
    that is gone adds nothing to the residual stream.

    Args:
        gone: sublayers that go (module paths in the dense model, such as ``model.layers.3.mlp``), ascending.
        hidden: dimensions of the residual stream that stay, ascending; None for all.
        tokens: rows of the embeddings that stay, ascending; None for all.
    """

    gone: tuple[str, ...] = ()
    hidden: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None

    @property
    def whole(self) -> bool:
        """Return whether all of the model stays."""
        return self == Outline()

    def layers(self, number: int) -> tuple[int, ...]:
        """Return the layers, of `number` in the dense model, of which a sublayer stays, ascending."""
        lost = [sum(path.startswith(f"model.layers.{i}.") for path in self.gone) for i in range(number)]
        return tuple(i for i, count in enumerate(lost) if count < len(SUBLAYERS))

    def skipped(self, number: int) -> tuple[str, ...]:
        """Return the sublayers that are gone from layers of which another stays, by their path in the smaller model."""
        index = {old: new for new, old in enumerate(self.layers(number))}
        split = [path.split(".") for path in self.gone]
        return tuple(f"model.layers.{index[int(p[2])]}.{p[3]}" for p in split if int(p[2]) in index)

    def dense_name(self, name: str, number: int) -> str:
        """Return the path in the dense model of a module or parameter of the smaller one."""
        parts = name.split(".")
        if name.startswith("model.layers."):
            parts[2] = str(self.layers(number)[int(parts[2])])
        return ".".join(parts)


SUBLAYERS = ("self_attn", "mlp")
WHOLE = Outline()


@value
class ModelStructure:
    """All groups of a model in the order of its layers, and its parameter counts.

    Args:
        parameters: number of elements of all parameters, tied ones counted once.
        embedding_parameters: those of the token embeddings and, where it is not tied, of the output head.
        output_biases: output projections whose bias compensation may set, and the number of parameters that this adds:
            D, or 0 where the projection has a bias already.
        lora_targets: last parts of the names of the projections that LoRA may adapt.
        stream: slices of the dimensions of the residual stream; every one of them owns a part of each.
        tokens: slices of the rows of the embeddings and, where it is not tied, of the output head.
        norms: parameters that leave with a sublayer beside its own, by its path.
        outline: how this model came out of a larger one.
        origin: the structure of that one; None where it is this one.
        stock_widths: by kind of group, the widths below the dense one that the family's stock class accepts in all
            layers at once; a kind left out may have any.
    """

    family: str
    layers: int
    groups: tuple[Group, ...]
    parameters: int
    embedding_parameters: int
    output_biases: dict[str, int]
    lora_targets: tuple[str, ...]
    stream: tuple[Slice, ...] = ()
    tokens: tuple[Slice, ...] = ()
    norms: dict[str, str] = dataclasses.field(default_factory=dict)
    outline: Outline = WHOLE
    origin: ModelStructure | None = None
    stock_widths: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def dense(self) -> ModelStructure:
        """Return the structure of the model that everything is counted against: budgets, plans, reports."""
        return self.origin or self

    def group(self, name: str) -> Group:
        """Return the group called `name`."""
        return next(g for g in self.groups if g.name == name)

    def dense_widths(self) -> dict[str, int]:
        """Return the width of every group before any cut."""
        return {g.name: g.width for g in self.groups}

    def count(self, widths: Mapping[str, int], biases: Mapping[str, int] | None = None) -> int:
        """Return the number of parameters left at `widths` (by group name, groups left out stay dense).

        Args:
            widths: units kept per partition.
            biases: number of elements of each bias that compensation adds, by module name.
        """
        removed = sum((g.width - widths.get(g.name, g.width)) * g.step_cost for g in self.groups)
        return self.parameters - removed + sum((biases or {}).values())

    def added(self, modules: Iterable[str]) -> dict[str, int]:
        """Return the number of parameters that a bias adds to each of `modules`, those that have one left out."""
        return {name: self.output_biases[name] for name in sorted(modules) if self.output_biases[name]}


def sizes(shape: ModelShape, structure: ModelStructure, outline: Outline) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that an outline leaves, by its name in the dense model.

    Args:
        shape: of the dense model.
        structure: of the same.
        outline: what stays.
    """
    lost = {structure.norms[path] for path in outline.gone}
    prefixes = tuple(f"{path}." for path in outline.gone)
    kept: dict[str, dict[int, int]] = {}
    for pieces, stays in ((structure.stream, outline.hidden), (structure.tokens, outline.tokens)):
        if stays is not None:
            for piece in pieces:
                kept.setdefault(piece.parameter, {})[piece.dim] = len(stays)
    return {
        name: tuple(kept.get(name, {}).get(dim, size) for dim, size in enumerate(dims))
        for name, dims in shape.shapes.items()
        if name not in lost and not name.startswith(prefixes)
    }


def count_outlined(shape: ModelShape, structure: ModelStructure, outline: Outline) -> int:
    """Return the number of parameters that an outline leaves; arguments as in `sizes`."""
    return sum(map(math.prod, sizes(shape, structure, outline).values()))


def priced(shape: ModelShape, group: Group) -> Group:
    """Return `group` with its unit cost counted from the shapes of its slices, which must hold exactly its units."""
    cost = 0
    for piece in group.slices:
        dims = shape.shapes[piece.parameter]
        size = dims[piece.dim]
        assert size == group.units * piece.block, f"{piece.parameter} has {size}, not {group.units} * {piece.block}"
        cost += math.prod(dims) // size * piece.block
    return dataclasses.replace(group, unit_cost=cost)
