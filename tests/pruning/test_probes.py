"""Gradients from forward passes alone: each probe measures the slope along it, and many of them the gradient."""

import pytest
import torch

from adasearch.pruning import calibration, importance, probes, statistics
from adasearch.pruning.statistics_cache import Cache
from tests.pruning.sample import component, sample, sequence_gradients, tokens
from tests.pruning.test_statistics_cache import Real

SPSA = frozenset({"spsa_sum"})


def _names(structure, weights):
    return [s.parameter for g in structure.groups for s in g.slices if weights[s.parameter].ndim == 2]


def _flat(found, names):
    return torch.cat([found[name].flatten().double() for name in names])


def test_each_sequence_gives_its_slope_along_its_probe(monkeypatch):
    case = sample()
    names = _names(case.structure, case.weights)
    # What is left is of its square, and the rounding of norms, which are float32 whatever the model is, divided by it.
    monkeypatch.setattr(probes, "EPSILON", 3e-4)
    found = probes.estimates(case.model, names, case.tokens, rows=7)
    gradients = sequence_gradients(case.model, case.tokens)
    expected = {name: torch.zeros_like(case.weights[name]) for name in names}
    for i, sequence in enumerate(case.tokens):
        z = {n: probes.signs(case.weights[n].shape, f"{probes.seed_of(sequence)} {n}", "cpu", torch.float64)
             for n in names}  # fmt: skip
        slope = sum((gradients[n][i] * z[n]).sum() for n in names)
        for name in names:
            expected[name] += slope * z[name]
    for name in names:
        assert (found[name] - expected[name]).norm() < 2e-3 * expected[name].norm()


def test_the_mean_over_all_probes_is_the_gradient_of_a_linear_loss():
    """For a loss <g, W> the estimate is <g, z> z exactly, and E[z z^T] = 1: over all signs of 8 elements, exactly."""
    g = torch.linspace(-1, 2, 8, dtype=torch.float64)
    every = torch.tensor([[1.0 if n >> i & 1 else -1.0 for i in range(8)] for n in range(256)], dtype=torch.float64)
    torch.testing.assert_close(((every @ g)[:, None] * every).mean(0), g)


def test_many_probes_approach_the_gradient_as_theory_says(monkeypatch):
    case = sample()
    (group,) = [g for g in case.structure.groups if g.name == "model.layers.1.mlp"]
    names = [s.parameter for s in group.slices]
    sequence = tokens(1)
    exact = _flat({n: g[0] for n, g in sequence_gradients(case.model, sequence).items()}, names)
    total, cosines = torch.zeros_like(exact), {}
    for count in range(1, 801):
        monkeypatch.setattr(probes, "seed_of", lambda _, count=count: str(count))
        total += _flat(probes.estimates(case.model, names, sequence, rows=100), names)
        cosines[count] = float(torch.cosine_similarity(total, exact, dim=0))
    for count in (100, 400, 800):
        theory = (1 + len(exact) / count) ** -0.5
        assert cosines[count] == pytest.approx(theory, rel=0.15)
    # Unbiased: along the gradient itself the mean is 1, give or take sqrt(2 / 800).
    assert float(total @ exact / (exact @ exact)) / 800 == pytest.approx(1, abs=0.2)


def test_signs_are_fair_independent_and_the_same_everywhere():
    shape = torch.Size((301, 7))
    one = probes.signs(shape, "a", "cpu", torch.float32)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(one.mean())) < 0.1
    assert torch.equal(one, probes.signs(shape, "a", "cpu", torch.float64).float())
    assert abs(float((one * probes.signs(shape, "b", "cpu", torch.float32)).mean())) < 0.1


def test_the_base_is_untouched_and_other_statistics_see_the_model_as_it_is():
    case = sample(dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    both = calibration.collect(case.model, case.structure, case.tokens, SPSA | {"moments"})
    again = calibration.collect(case.model, case.structure, case.tokens, SPSA, token_budget=1)
    alone = calibration.collect(case.model, case.structure, case.tokens, frozenset({"moments"}))
    for name, tensor in (again.tensors | alone.tensors).items():
        assert torch.equal(both.tensors[name], tensor)
    assert all(torch.equal(before[name], p) for name, p in case.model.named_parameters())
    assert not any(m._forward_hooks for m in case.model.modules())


def test_extended_is_fresh(tmp_path):
    case = sample(dtype=torch.float32)
    cache, origin = Cache(folder=tmp_path), Real(case, case.tokens)
    for size in (2, 5):
        found = cache.obtain("key", size, SPSA, origin)
    assert origin.asked == [(0, 2), (2, 5)]
    fresh = calibration.collect(case.model, case.structure, case.tokens, SPSA)
    for name, tensor in fresh.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max()))


def test_product_reads_the_estimate():
    case = sample()
    chosen = component("importance", "product", alpha=1.0, beta=0.0, gamma=1.0, gradient="spsa", probe="all")
    assert importance.needs(chosen) == SPSA
    held = calibration.collect(case.model, case.structure, case.tokens, SPSA)
    found = importance.score_all(case.structure, case.weights, held, chosen, 0)
    for group in case.structure.groups:
        for unit in range(group.units):
            expected = 0.0
            for part in (s for s in group.slices if case.weights[s.parameter].ndim == 2):
                at = torch.arange(unit * part.block, (unit + 1) * part.block)
                w = case.weights[part.parameter].index_select(part.dim, at)
                g = held.tensors[f"spsa_sum/{part.parameter}/total"].index_select(part.dim, at)
                expected += float((w * g).abs().sum())
            assert float(found[group.name][unit]) == pytest.approx(expected, rel=1e-4)
    assert held.families == SPSA <= statistics.LARGE
