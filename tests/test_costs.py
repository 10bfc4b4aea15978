"""What a model costs: counts against the tensors of real models, and a latency that knows larger from smaller."""

import dataclasses

import numpy as np
import pytest
import torch

from adasearch import costs
from adasearch.config import TrialConfig, study_from_dict
from adasearch.models import dense_model
from adasearch.trial import Clock, prune, run_trial
from adasearch.workbench import Workbench
from tests.tiny import save_checkpoint

SAMPLE = {"corpus": "pydoc", "samples": 2, "length": 32}
TOKENS = 24


def bench_of(checkpoint, folder, **objective):
    study = {
        "name": "s",
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "space": {"budget.remove": {"float": [0.1, 0.5]}},
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 4, "select": 4, "latency_tokens": TOKENS, **objective},
        "report": {"tasks": ["cloze/pydoc"], "items": 4},
        "trial": {"calibration": SAMPLE},
        "recipes": "none",
        "fidelity": {"divergence": 0},
    }
    return Workbench(study_from_dict(study, "study:", folder / "study.yaml"), folder / "run", threads=1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costs")
    checkpoint = save_checkpoint(folder / "tiny", "qwen3", num_hidden_layers=4)
    return bench_of(checkpoint, folder, also=["parameters", "memory"], at_most={"latency": 2.0})


def trial(**sections):
    return TrialConfig.from_dict({"calibration": SAMPLE, **sections}, "trial")


CASES = {
    "groups": {},
    "heads": {"units": {"attention": "head"}},
    "mlp_only": {"units": {"attention": "none"}},
    "biases": {"compensation": "bias", "importance": "flap"},
    "outline": {
        "depth": {"type": "block_influence", "unit": "sublayer", "share": 0.5},
        "hidden": {"type": "activation_norm", "remove": 0.3},
    },
    "much": {"budget": {"remove": 0.5}},
}


@pytest.mark.parametrize("case", CASES)
def test_memory_and_parameters_are_those_of_the_real_tensors(bench, case):
    pruned = prune(trial(**CASES[case]), bench, Clock())
    found = costs.measured(bench, pruned.model, pruned.structure, pruned.plan)
    weights = {id(p): p for p in pruned.model.parameters()}.values()
    with torch.no_grad():
        cache = pruned.model(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=True).past_key_values
    held = [t for layer in cache.layers if layer.keys is not None for t in (layer.keys, layer.values)]
    assert found.figures["parameters"] == sum(p.numel() for p in weights)
    assert found.figures["memory"] == sum(t.numel() * t.element_size() for t in [*weights, *held])
    whole = costs.measured(bench, bench.dense(), bench.structure(), None)
    for cost in ("parameters", "memory"):
        assert found.shares[cost] == found.figures[cost] / whole.figures[cost]
    assert set(whole.shares.values()) == {1.0}


def test_a_trial_is_cut_to_its_own_budget(bench):
    for remove in (None, 0.1, 0.35, 0.5):
        left = prune(trial(budget={"remove": remove}), bench, Clock()).plan.parameters
        whole = bench.structure().parameters
        most = (1 - (remove or 0.2)) * whole
        largest = max(group.step_cost for group in bench.structure().groups)
        assert most - largest <= left <= most


def test_a_trial_has_the_costs_that_were_asked_for_and_no_others(bench, tmp_path):
    result, _ = run_trial(trial().to_dict(), bench)
    assert set(result.costs) == set(result.shares) == {"parameters", "latency", "memory"}
    assert set(result.spreads) == {"latency"}
    assert result.costs["parameters"] == result.parameters
    assert result.shares["latency"] > 0
    assert "costs" in result.seconds
    plain = bench_of(bench.study.model.name, tmp_path)
    result, _ = run_trial(trial().to_dict(), plain)
    assert (result.costs, result.shares, result.spreads) == ({}, {}, {})
    assert "costs" not in result.seconds


def test_a_latency_tells_a_large_model_from_a_small_one(bench):
    half = dataclasses.replace(bench.base, config=bench.base.config)
    small = dense_model(half)
    small.model.layers = small.model.layers[:1]
    found = costs.latency(small, bench.dense(), TOKENS)
    assert 0.2 < found.share < 0.85
    same = costs.latency(bench.dense(), bench.dense(), TOKENS)
    assert abs(same.share - 1) < 0.3
    assert same.seconds > 0


@pytest.mark.parametrize("learning", [True, False])
def test_odd_addresses_are_left_behind_and_all_else_is_shared(learning):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    odd = torch.randn(8 * 8 + 2)[2:].view(8, 8)
    assert odd.data_ptr() % 64
    model[0].weight = torch.nn.Parameter(odd)
    model.requires_grad_(learning)
    tied = torch.nn.Sequential(model, model[0])
    with torch.inference_mode():
        found = costs.aligned(tied)
    assert all(p.data_ptr() % 64 == 0 for p in found.parameters())
    assert found[1].weight is found[0][0].weight
    assert all(p.requires_grad == learning for p in found.parameters()), "torch computes otherwise without"
    assert not any(p.is_inference() for p in found.parameters())
    assert found[0][1].weight is model[1].weight
    assert model[0].weight.data_ptr() == odd.data_ptr()
    x = torch.randn(3, 8)
    assert torch.equal(found(x), tied(x))


def test_one_disturbed_pass_moves_a_latency_little(bench, monkeypatch):
    times = iter([9.0, 9.0, 1.0, 2.0, 2.0, 1.0, 50.0, 2.0, 2.0, 1.0, 1.0, 2.0])
    monkeypatch.setattr(costs, "pass_seconds", lambda *_: next(times))
    monkeypatch.setattr(costs, "MOST_PAIRS", costs.LEAST_PAIRS)
    found = costs.latency(bench.dense(), bench.dense(), TOKENS)
    assert (found.seconds, found.share, found.spread) == (1.0, 0.5, 0.0)


def test_the_error_of_a_median_is_that_of_many_medians():
    draws = np.random.default_rng(0).normal(size=(4000, 101))
    assert np.mean([costs.median_error(row) for row in draws[:400]]) == pytest.approx(
        np.median(draws, axis=1).std(), rel=0.05
    )
