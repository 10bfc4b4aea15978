"""What every unit selection owes its callers; a new file in the folder is tested by being there."""

import dataclasses

import pytest
import torch

from adasearch.config import Component
from adasearch.pruning import selection
from adasearch.pruning.importance import GroupView
from adasearch.pruning.plan import check_plan, make_plan
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.registry import SELECTION
from tests.pruning.sample import sample


def _scores(group, seed=0):
    return torch.rand(group.units, generator=torch.Generator().manual_seed(seed))


def _parts(group, keep):
    return [sum(1 for unit in keep if unit // group.width == part) for part in range(group.partitions)]


@pytest.mark.parametrize("name", SELECTION.names())
class TestSelectionContract:
    def _component(self, name):
        return Component(type=name, options=SELECTION.get(name).options())

    def _select(self, case, name, group, width, statistics=None, seed=3):
        view = GroupView(group=group, weights=case.weights, statistics=statistics or case.statistics, seed=seed)
        return selection.select(view, _scores(group), width, self._component(name))

    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = SELECTION.get(name)
        assert entry.name == name
        assert dataclasses.is_dataclass(entry.options())
        assert hash(entry.options()) == hash(entry.options())
        assert entry.function.__doc__

    def test_needs_are_known_families(self, name):
        assert selection.needs(self._component(name)) <= FAMILIES

    @pytest.mark.parametrize("unit", ["kv_group", "head"])
    def test_keeps_the_width_of_each_partition_ascending_and_distinct(self, name, unit):
        case = sample(unit)
        for group in case.structure.groups:
            for width in {1, group.width // 2 or 1, group.width - 1 or 1}:
                keep = self._select(case, name, group, width)
                assert list(keep) == sorted(set(keep))
                assert all(isinstance(u, int) and 0 <= u < group.units for u in keep)
                assert _parts(group, keep) == [width] * group.partitions

    def test_at_the_dense_width_all_units_stay_and_nothing_is_read(self, name):
        case = sample()
        for group in case.structure.groups:
            view = GroupView(group=group, weights={}, statistics=None, seed=0)
            kept = selection.select(view, _scores(group), group.width, self._component(name))
            assert kept == tuple(range(group.units))

    def test_reads_no_more_than_it_needs(self, name):
        case = sample("head")
        needed = selection.needs(self._component(name))
        part = {k: t for k, t in case.statistics.tensors.items() if k.split("/")[0] in needed}
        few = Statistics(tokens=case.statistics.tokens, tensors=part)
        for group in case.structure.groups:
            width = max(1, group.width // 2)
            assert self._select(case, name, group, width, few) == self._select(case, name, group, width)

    def test_is_deterministic_and_changes_nothing(self, name):
        case = sample("head")
        before = {k: t.clone() for k, t in {**case.weights, **case.statistics.tensors}.items()}
        for group in case.structure.groups:
            width = max(1, group.width // 2)
            assert self._select(case, name, group, width) == self._select(case, name, group, width)
        after = {**case.weights, **case.statistics.tensors}
        assert all(torch.equal(before[k], after[k]) for k in before)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_makes_a_plan(self, name, dtype):
        case = sample("head", dtype=dtype)
        scores = {g.name: _scores(g) for g in case.structure.groups}
        widths = {g.name: max(1, g.width // 2) for g in case.structure.groups}
        choose = selection.chooser(self._component(name), case.weights, case.statistics, 3)
        plan = make_plan(case.structure, case.units, scores, widths, choose=choose)
        check_plan(plan, case.structure)
        assert plan.widths(case.structure) == widths
