"""What every depth rule owes its callers; a new file in the folder is tested by being there."""

import dataclasses
import itertools

import pytest
import torch

from adasearch.config import Component
from adasearch.pruning import depth
from adasearch.pruning.depth import DepthContext, DepthOptions, layer_of
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.registry import DEPTH
from tests.pruning.sample import made_boundaries, made_statistics, made_structure

LAYERS = 6
STRUCTURE = made_structure(LAYERS)
COSTS = {g.name: g.units * g.unit_cost + 8 for g in STRUCTURE.groups}
ALL = sum(COSTS.values())


def _statistics(families):
    parts = {**made_statistics(STRUCTURE).tensors, **made_boundaries(LAYERS)}
    return Statistics(tokens=100, tensors={k: t for k, t in parts.items() if k.split("/")[0] in families})


def _additive(gone):
    """A loss to which each sublayer adds its own part, and neighbours a little more."""
    parts = torch.rand(2 * LAYERS, generator=torch.Generator().manual_seed(4)).tolist()
    numbers = sorted(i for i, path in enumerate(COSTS) if path in gone)
    return sum(parts[i] for i in numbers) + 0.1 * sum(b - a == 1 for a, b in itertools.pairwise(numbers))


@pytest.mark.parametrize("name", DEPTH.names())
class TestDepthContract:
    def _component(self, name, **options):
        return Component(type=name, options=DEPTH.get(name).options(**options))

    def _context(self, name, room, loss=None):
        def forbidden(_):
            raise AssertionError("this rule said that it asks for no loss")

        component = self._component(name)
        families = depth.needs(component)
        return DepthContext(
            layers=LAYERS,
            costs=COSTS,
            room=room,
            share_removed=room / ALL,
            statistics=_statistics(families) if families else None,
            loss=(loss or _additive) if depth.uses_loss(component) else forbidden,
            seed=3,
        )

    def _choose(self, name, room, **options):
        return depth.choose(self._context(name, room), self._component(name, **options))

    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = DEPTH.get(name)
        assert entry.name == name
        assert dataclasses.is_dataclass(entry.options())
        assert hash(entry.options()) == hash(entry.options())
        assert isinstance(entry.options(), DepthOptions) or name == "none"
        assert entry.function.__doc__

    def test_needs_are_known_families(self, name):
        assert depth.needs(self._component(name)) <= FAMILIES

    @pytest.mark.parametrize("room", [0, 500, 1208, 2500, 5000, 9000, ALL, 10 * ALL])
    def test_keeps_within_its_room_and_leaves_a_layer_whole(self, name, room):
        chosen = self._choose(name, room)
        assert isinstance(chosen, tuple)
        assert len(set(chosen)) == len(chosen)
        assert set(chosen) <= set(COSTS)
        assert sum(COSTS[path] for path in chosen) <= room
        assert len({layer_of(path) for path in chosen}) < LAYERS
        if name != "none" and room >= ALL // 2:
            assert chosen

    @pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
    def test_takes_its_share_of_the_room(self, name, share):
        if name == "none":
            assert self._choose(name, ALL) == ()
        else:
            assert self._choose(name, 9000, share=share) == self._half(name, int(9000 * share), 9000)

    def _half(self, name, room, whole):
        context = dataclasses.replace(self._context(name, room), share_removed=whole / ALL)
        return depth.choose(context, self._component(name))

    def test_is_deterministic(self, name):
        assert self._choose(name, 6000) == self._choose(name, 6000)

    def test_takes_losses_that_are_infinite(self, name):
        context = self._context(name, 6000, loss=lambda gone: float("inf"))
        chosen = depth.choose(context, self._component(name))
        assert context.cost(chosen) <= 6000
