"""Depth rules: which whole layers or sublayers leave a model, one file each.

An entry is ``choose(context: DepthContext, options) -> tuple[str, ...]``: the module paths of the sublayers that go, in
the order in which they were chosen. Its fact `needs` is a function ``options -> frozenset[str]``: the families of
`Statistics` read; its fact `uses_loss` says whether it asks for losses. Options extend `DepthOptions`, where an entry
removes anything at all. Depth removes what fits its room, never more; the rest of a budget is left to widths.

An *item* is what goes at once: the paths of one layer's attention and MLP, or of one of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from adasearch.config import Component
from adasearch.documents import Count, Share, value
from adasearch.pruning.statistics import Statistics
from adasearch.registry import DEPTH

Unit = Literal["layer", "sublayer", "attention", "mlp"]
"""What goes at once: a layer, either sublayer of one, its attention, its MLP."""
Item = tuple[str, ...]

_PARTS: dict[Unit, tuple[str, ...]] = {
    "layer": (),
    "sublayer": ("self_attn", "mlp"),
    "attention": ("self_attn",),
    "mlp": ("mlp",),
}


@value
class DepthOptions:
    """Settings of every rule that removes something.

    Args:
        share: of the parameters to remove, that depth takes at most; the rest is left to widths.
    """

    share: Share = 1.0


@value
class LossOptions(DepthOptions):
    """Settings of every rule that asks for losses.

    Args:
        sequences: of the calibration sample, that losses are taken over. A rule may ask for hundreds of losses; those
            of different sets are paired, so that few sequences tell them apart. 2SSP takes one of 2048 tokens.
    """

    sequences: Count = 8


def layer_of(path: str) -> int:
    """Return the index of the layer that the sublayer at a module path belongs to."""
    return int(path.rpartition(".")[0].rpartition(".")[2])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DepthContext:
    """What a depth rule may look at.

    Args:
        layers: number of layers of the dense model.
        costs: parameters that go with each sublayer that may go, its norm included, by module path
            (``model.layers.3.self_attn``, ``model.layers.3.mlp``), in the order of the model.
        room: parameters that depth may remove at most.
        share_removed: fraction of the parameters of all layers that the budget removes.
        statistics: holds at least what the rule needs; None where it needs nothing.
        loss: loss of the model without some sublayers on calibration tokens, lower is better; cheapest where one set
            follows another that has the same sublayers in its lowest layers.
        seed: of the trial.
    """

    layers: int
    costs: Mapping[str, int]
    room: int
    share_removed: float
    statistics: Statistics | None
    loss: Callable[[frozenset[str]], float]
    seed: int

    @property
    def known(self) -> Statistics:
        """Return the statistics, where the rule needs some."""
        assert self.statistics is not None, "this depth rule must be given statistics"
        return self.statistics

    def within(self, share: float) -> DepthContext:
        """Return the same with `share` of the room."""
        return dataclasses.replace(self, room=int(share * self.room))

    def items(self, unit: Unit, first: int = 0, last: int = 0) -> tuple[Item, ...]:
        """Return what may go at once, in the order of the model; the `first` and `last` layers are left out."""
        inner = [path for path in self.costs if first <= layer_of(path) < self.layers - last]
        if unit != "layer":
            return tuple((path,) for path in inner if path.rpartition(".")[2] in _PARTS[unit])
        layers: dict[int, list[str]] = {}
        for path in inner:
            layers.setdefault(layer_of(path), []).append(path)
        return tuple(tuple(paths) for paths in layers.values() if len(paths) == len(_PARTS["sublayer"]))

    def cost(self, paths: Iterable[str]) -> int:
        """Return the number of parameters that go with sublayers."""
        return sum(self.costs[path] for path in paths)

    def fits(self, paths: frozenset[str]) -> bool:
        """Return whether sublayers may go together: they keep within the room, and one layer stays whole."""
        return self.cost(paths) <= self.room and len({layer_of(path) for path in paths}) < self.layers

    def fitting(self, order: Iterable[Item]) -> tuple[Item, ...]:
        """Return the items that go when they are asked in order: each that still fits beside those before it."""
        gone: frozenset[str] = frozenset()
        taken: list[Item] = []
        for item in order:
            if self.fits(gone | set(item)):
                gone |= set(item)
                taken.append(item)
        return tuple(taken)


def paths_of(items: Iterable[Item]) -> tuple[str, ...]:
    """Return the module paths of items, in their order."""
    return tuple(path for item in items for path in item)


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that a depth rule with these options reads."""
    found: frozenset[str] = DEPTH.get(component.type).facts["needs"](component.options)
    return found


def uses_loss(component: Component) -> bool:
    """Return whether a depth rule asks for losses of the model without sublayers."""
    return bool(DEPTH.get(component.type).facts["uses_loss"])


def choose(context: DepthContext, component: Component) -> tuple[str, ...]:
    """Return the sublayers (module paths) that the rule called `component.type` removes, in the order of its choice."""
    options = component.options
    room = context.within(options.share) if isinstance(options, DepthOptions) else context
    chosen: tuple[str, ...] = DEPTH.get(component.type).function(room, options)
    assert set(chosen) <= set(context.costs), f"{component.type} must choose among the sublayers, gave {chosen}"
    assert len(set(chosen)) == len(chosen), f"{component.type} must choose a sublayer once, gave {chosen}"
    assert room.fits(frozenset(chosen)), f"{component.type} must keep within {room.room} parameters, gave {chosen}"
    return chosen
