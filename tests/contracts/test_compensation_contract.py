"""What every compensation owes its callers; a new file in the folder is tested by being there."""

import dataclasses

import pytest
import torch

from adasearch.config import Component
from adasearch.pruning import compensation, surgery
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.registry import COMPENSATION
from tests.pruning.sample import sample
from tests.tiny import FAMILIES as MODEL_FAMILIES
from tests.tiny import random_plan


@pytest.mark.parametrize("name", COMPENSATION.names())
class TestCompensationContract:
    def _component(self, name):
        return Component(type=name, options=COMPENSATION.get(name).options())

    def _compensated(self, case, name, widths, statistics=None):
        made = self._component(name)
        plan = random_plan(case.structure, case.units, widths, biases=compensation.bias_modules(made, case.structure))
        model = surgery.cut(case.config, case.weights, case.structure, plan)
        compensation.apply(model, case.structure, plan, statistics or case.statistics, case.weights, made)
        return plan, model

    def _widths(self, case):
        return {g.name: max(1, g.width // 2) for g in case.structure.groups}

    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = COMPENSATION.get(name)
        assert entry.name == name
        assert dataclasses.is_dataclass(entry.options())
        assert hash(entry.options()) == hash(entry.options())
        assert entry.function.__doc__

    def test_needs_are_known_families(self, name):
        assert compensation.needs(self._component(name)) <= FAMILIES

    @pytest.mark.parametrize("family", MODEL_FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_keeps_shapes_and_formats_and_runs(self, name, family, dtype):
        case = sample(dtype=dtype, family=family)
        plan, model = self._compensated(case, name, self._widths(case))
        assert sum(p.numel() for p in model.parameters()) == plan.parameters
        assert {p.dtype for p in model.parameters()} == {dtype}
        with torch.no_grad():
            assert model(input_ids=case.tokens).logits.isfinite().all()

    def test_changes_nothing_but_output_projections(self, name):
        case = sample()
        plan, model = self._compensated(case, name, self._widths(case))
        plain = dict(surgery.cut(case.config, case.weights, case.structure, plan).named_parameters())
        outputs = {g.output for g in case.structure.groups}
        for parameter, found in model.named_parameters():
            if parameter.rpartition(".")[0] not in outputs:
                assert torch.equal(found, plain[parameter])

    def test_a_model_that_lost_nothing_is_the_dense_model(self, name):
        case = sample()
        _, model = self._compensated(case, name, {})
        with torch.no_grad():
            assert torch.equal(model(input_ids=case.tokens).logits, case.model(input_ids=case.tokens).logits)

    def test_leaves_dense_weights_and_statistics_alone(self, name):
        case = sample()
        before = {k: t.clone() for k, t in {**case.weights, **case.statistics.tensors}.items()}
        self._compensated(case, name, self._widths(case))
        after = {**case.weights, **case.statistics.tensors}
        assert all(torch.equal(before[k], after[k]) for k in before)

    def test_reads_no_more_than_it_needs(self, name):
        case = sample()
        needed = compensation.needs(self._component(name))
        part = {k: t for k, t in case.statistics.tensors.items() if k.split("/")[0] in needed}
        few = Statistics(tokens=case.statistics.tokens, tensors=part)
        pair = [self._compensated(case, name, self._widths(case), s)[1] for s in (few, case.statistics)]
        for a, b in zip(*(model.parameters() for model in pair), strict=True):
            assert torch.equal(a, b)
            assert a.grad is None

    def test_is_deterministic(self, name):
        case = sample()
        one, two = (self._compensated(case, name, self._widths(case))[1] for _ in range(2))
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)
