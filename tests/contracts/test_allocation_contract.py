"""What every allocation owes its callers; a new file in the folder is tested by being there."""

import dataclasses
import math

import pytest
import torch

from adasearch.config import Component
from adasearch.pruning import allocation
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.projection import project
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.registry import ALLOCATION
from tests.pruning.sample import budget, made_statistics, made_structure, made_weights


@pytest.mark.parametrize("name", ALLOCATION.names())
class TestAllocationContract:
    structure = made_structure(12, heads=4, partitions=2)
    statistics = made_statistics(structure)
    weights = made_weights(structure)

    def _component(self, name):
        return Component(type=name, options=ALLOCATION.get(name).options())

    def _scores(self):
        generator = torch.Generator().manual_seed(0)
        return {g.name: torch.rand(g.units, generator=generator) for g in self.structure.groups}

    def _ratios(self, name, asked):
        return self._shape(name, self._scores(), asked)

    def _shape(self, name, scores, asked, statistics=None):
        context = AllocationContext(
            structure=self.structure,
            budget=asked,
            scores=scores,
            statistics=statistics or self.statistics,
            weights=self.weights,
        )
        return allocation.shape(context, self._component(name))

    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = ALLOCATION.get(name)
        assert entry.name == name
        assert dataclasses.is_dataclass(entry.options())
        assert hash(entry.options()) == hash(entry.options())
        assert entry.function.__doc__

    def test_needs_are_known_families(self, name):
        assert allocation.needs(self._component(name)) <= FAMILIES

    def test_gives_each_group_a_finite_ratio(self, name):
        found = self._ratios(name, budget(0.2))
        assert set(found) == {g.name for g in self.structure.groups}
        assert all(isinstance(r, float) and math.isfinite(r) and r >= 0 for r in found.values())
        assert max(found.values()) > 0

    @pytest.mark.parametrize("remove", [0.05, 0.2, 0.3])
    @pytest.mark.parametrize("multiple", [1, 8])
    def test_projects_onto_the_budget(self, name, remove, multiple):
        asked = budget(remove, multiple_of=multiple)
        widths = project(self.structure, self._ratios(name, asked), asked)
        kept = self.structure.count(widths)
        assert 0 <= (1 - remove) * self.structure.parameters - kept < multiple * 30

    def test_is_deterministic_and_changes_nothing(self, name):
        scores = self._scores()
        held = {**scores, **self.statistics.tensors, **self.weights}
        before = {k: s.clone() for k, s in held.items()}
        one, two = (self._shape(name, scores, budget(0.2)) for _ in range(2))
        assert one == two
        assert all(torch.equal(held[k], before[k]) for k in before)

    def test_reads_no_more_than_it_needs(self, name):
        needed = allocation.needs(self._component(name))
        part = {k: t for k, t in self.statistics.tensors.items() if k.split("/")[0] in needed}
        few = self._shape(name, self._scores(), budget(0.2), Statistics(tokens=100, tensors=part))
        assert few == self._ratios(name, budget(0.2))
