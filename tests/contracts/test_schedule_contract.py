"""What every pruning schedule owes its callers; a new file in the folder is tested by being there."""

import dataclasses

import pytest
import torch

from adasearch.pruning import schedule
from adasearch.pruning.plan import check_plan
from adasearch.pruning.projection import removal
from adasearch.registry import SCHEDULE
from tests.pruning.sample import sample, schedule_context
from tests.tiny import FAMILIES


def _made(context):
    """The decision, and the model that it ends in."""
    decision = schedule.decide(context)
    return decision, schedule.cut(context, decision)


@pytest.mark.parametrize("name", SCHEDULE.names())
class TestScheduleContract:
    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = SCHEDULE.get(name)
        assert entry.name == name
        assert dataclasses.is_dataclass(entry.options())
        assert hash(entry.options()) == hash(entry.options())
        assert entry.function.__doc__
        ranked = {"check"} if getattr(entry.options(), "rank", 0) else set()
        assert {"compensates", "selects", "sources", "learns"} | ranked == set(entry.facts)

    @pytest.mark.parametrize("remove", [0.05, 0.2, 0.35])
    @pytest.mark.parametrize("compensation", ["none", "bias", "least_squares", "affine_out"])
    def test_meets_the_budget(self, name, remove, compensation):
        context = schedule_context(sample(), name, remove, compensation=compensation)
        decision, model = _made(context)
        check_plan(decision.plan, context.structure)
        most = context.structure.parameters - removal(context.structure, context.budget)
        assert decision.plan.parameters <= most
        assert decision.plan.biases == context.biases
        assert sum(p.numel() for p in model.parameters()) == decision.plan.parameters

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("attention", ["kv_group", "head", "none"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_model_runs_in_its_format(self, name, family, attention, dtype):
        case = sample(attention, dtype, family)
        _, model = _made(schedule_context(case, name, compensation="affine_out"))
        assert {p.dtype for p in model.parameters()} == {dtype}
        with torch.no_grad():
            assert model(input_ids=case.tokens).logits.isfinite().all()

    def test_is_deterministic(self, name):
        context = schedule_context(sample(), name, compensation="least_squares")
        (one, a), (two, b) = _made(context), _made(context)
        assert one.plan == two.plan
        for left, right in zip(a.parameters(), b.parameters(), strict=True):
            assert torch.equal(left, right)

    @pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}])
    def test_leaves_dense_weights_and_statistics_alone(self, name, changes):
        case = sample(**changes)
        context = schedule_context(case, name, compensation="affine_out")
        held = {**case.weights, **context.statistics.tensors}
        before = {k: t.clone() for k, t in held.items()}
        with torch.no_grad():
            logits = case.model(input_ids=case.tokens).logits
            _made(context)
            assert torch.equal(case.model(input_ids=case.tokens).logits, logits)
        assert all(torch.equal(before[k], held[k]) for k in before)

    def test_groups_of_dense_width_stay_whole(self, name):
        case = sample(num_hidden_layers=4)
        context = schedule_context(
            case, name, 0.1, allocation={"type": "skip_ends", "first": 1, "last": 1}, compensation="least_squares"
        )
        decision, model = _made(context)
        weights = dict(model.named_parameters())
        for group in case.structure.groups:
            if group.layer in {0, 3}:
                assert decision.plan.keep[group.name] == tuple(range(group.units))
                assert group.output not in decision.outputs
                for part in group.slices:
                    base = decision.weights.get(part.parameter, case.weights[part.parameter])
                    assert torch.equal(weights[part.parameter], base)
            elif group.kind == "mlp":
                assert len(decision.plan.keep[group.name]) < group.units

    def test_widths_are_multiples(self, name):
        context = schedule_context(sample(), name, budget_of={"multiple_of": 8})
        widths = schedule.decide(context).plan.widths(context.structure)
        assert all(w % 8 == 0 for g, w in widths.items() if g.endswith("mlp"))

    def test_only_what_learns_changes_what_is_cut(self, name):
        context = schedule_context(sample(), name)
        decision = schedule.decide(context)
        assert bool(decision.weights) == SCHEDULE.get(name).facts["learns"]
        for key, weight in decision.weights.items():
            assert weight.shape == context.weights[key].shape
            assert not torch.equal(weight, context.weights[key])

    def test_reads_the_seed(self, name):
        plans = [schedule.decide(schedule_context(sample(), name, importance="random", seed=s)).plan for s in (0, 0, 1)]
        assert plans[0] == plans[1] != plans[2]
