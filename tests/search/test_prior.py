"""Earlier searches as the mean of this one's model: values, gradients, weights, start trials, worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from adasearch.search.earlier import Earlier
from adasearch.search.prior import Prior, source_mean
from adasearch.search.stacking import DEFAULT_WEIGHT
from adasearch.search.surrogate import Candidates, Observations, fit, propose
from benchmarks.warm_start import extra, measure, needed

D = 4


def bowl(points, centre=0.3):
    return -((points - centre) ** 2).sum(-1)


def earlier(centre=0.35, sign=1.0, n=30, seed=0, name="runs/a", scale=2.0):
    rng = np.random.default_rng(seed)
    points = rng.random((n, D))
    scores = 5 + scale * sign * bowl(points, centre) + 0.02 * rng.standard_normal(n)
    params = tuple({"x": tuple(row)} if i % 2 else None for i, row in enumerate(points.tolist()))
    return Earlier(
        run=name, points=tuple(map(tuple, points.tolist())), params=params, scores=tuple(scores.tolist()),
        variances=(0.02**2,) * n, scored=n,
    )  # fmt: skip


def told(n=10, seed=1):
    rng = np.random.default_rng(seed)
    points = rng.random((n, D))
    return points, bowl(points) + 0.02 * rng.standard_normal(n), np.zeros(n)


@pytest.fixture(scope="module")
def prior():
    return Prior((earlier(), earlier(sign=-1.0, name="runs/b", seed=2)))


def key(params):
    return repr(params)


def test_a_source_is_the_posterior_mean_of_its_gaussian_process():
    source = earlier()
    scores, variances = np.array(source.scores), np.array(source.variances)
    data = Observations(points=source.features, scores=scores, variances=variances * 0, pending=np.empty((0, D)))
    model = fit(data)
    x = torch.rand(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = source_mean(source.features, scores, variances)(x)
    assert torch.allclose(expected, model.posterior(x).mean.squeeze(-1), atol=1e-5)


def test_the_mean_foretells_the_scores_in_their_own_units(prior):
    mean = prior.fit(*told())
    assert mean.weights[0] > 0.9
    assert mean.weights[1] == 0
    points, scores, _ = told(40, seed=5)
    assert np.abs(mean.at(points) - scores).mean() < 0.3 * scores.std()


def test_the_mean_can_be_climbed(prior):
    mean = prior.fit(*told())
    x = torch.rand(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = mean(x)
    assert values.shape == (2, 3)
    assert np.allclose(mean.at(x.detach().numpy()), values.detach().numpy())
    values.sum().backward()
    step = torch.zeros_like(x)
    step[0, 0, 0] = 1e-5
    with torch.no_grad():
        numeric = (mean(x + step)[0, 0] - mean(x - step)[0, 0]) / 2e-5
    assert x.grad[0, 0, 0].item() == pytest.approx(numeric.item(), rel=1e-4)


def test_before_there_are_enough_trials_the_sources_share_the_default_weight(prior):
    mean = prior.fit(*told(3))
    assert mean.weights == (DEFAULT_WEIGHT / 2, DEFAULT_WEIGHT / 2)
    assert np.isfinite(prior.fit(np.empty((0, D)), np.empty(0), np.empty(0)).at(told(3)[0])).all()


def ranked(source, centre=0.35, sign=1.0):
    """Return the points that count, best first by what the source was sampled from."""
    rows = np.array(source.features[1::2])
    return [{"x": tuple(rows[i].tolist())} for i in np.argsort(-sign * bowl(rows, centre))]


def test_every_other_proposal_is_a_best_point_of_the_sources_in_turns(prior):
    best_a, best_b = ranked(prior.sources[0])[0], ranked(prior.sources[1], sign=-1.0)[0]
    assert prior.start(0, 6, key, {}) == best_a
    assert prior.start(1, 6, key, {key(best_a): None}) is None
    assert prior.start(2, 6, key, {key(best_a): None, "other": 0.5}) == best_b
    third = prior.start(4, 6, key, {key(best_a): 0.9, key(best_b): 0.9, "other": 0.5})
    assert third in prior._ranked[0][1:3]
    assert prior.start(6, 9, key, {}) is None
    assert prior.start(2, 2, key, {}) is None
    assert prior.start(2, 6, key, {key(best_a): 0.9, key(best_b): 0.1, "other": 0.5}) == third


def test_a_source_whose_point_does_badly_gives_no_more(prior):
    alone = Prior(prior.sources[:1])
    best = ranked(alone.sources[0])[0]
    assert alone.start(2, 6, key, {key(best): 0.4, "x": 0.3, "y": 0.4, "z": 0.5}) is not None
    assert alone.start(2, 6, key, {key(best): 0.3, "x": 0.3, "y": 0.4, "z": 0.5}) is None
    assert alone.start(2, 6, key, {key(best): 0.3, "x": None}) is not None
    unexpressed = Prior((dataclasses.replace(prior.sources[0], params=(None,) * 30),))
    assert unexpressed.start(0, 6, key, {}) is None


def test_the_model_of_the_search_starts_from_the_mean(prior):
    points, scores, variances = told(8)
    mean = prior.fit(points, scores, variances)
    data = Observations(points=points, scores=scores, variances=variances, pending=np.empty((0, D)))
    at = torch.as_tensor(told(60, seed=9)[0])
    truth = bowl(at.numpy())

    def agreement(data):
        found = fit(data).posterior(at).mean.squeeze(-1).detach().numpy()
        return np.corrcoef(found, truth)[0, 1]

    informed = dataclasses.replace(data, expected=mean)
    assert agreement(informed) > max(0.95, agreement(data))
    candidates = np.random.default_rng(3).random((100, D))
    where = Candidates(points=candidates, free=np.full(candidates.shape, True), snap=lambda i, row: row)
    best = propose(informed, where, 0, 1)[0].features
    assert np.abs(best - 0.3).max() < 0.25


def test_a_mean_of_nothing_changes_nothing():
    points, scores, variances = told(12)
    data = Observations(points=points, scores=scores, variances=variances, pending=np.empty((0, D)))
    flat = dataclasses.replace(data, expected=lambda x: torch.zeros(x.shape[:-1], dtype=x.dtype))
    x = torch.as_tensor(told(5, seed=4)[0])
    one, two = (fit(d).posterior(x).mean for d in (data, flat))
    assert torch.allclose(one, two, atol=1e-6)


def test_the_line_of_a_source_says_how_far_it_is_believed(prior):
    assert prior.lines((0.6, 0.0))[0].startswith("runs/a: weight 0.60, 30 of 30 scored trials are of use")


def test_trials_needed_are_counted_from_one():
    assert needed([0.1, 0.5, 0.4], 0.5) == 2
    assert needed([0.1], 0.5) == 2
    share, low, high = extra(np.array([11, 22]), np.array([10, 20]))
    assert share == low == high == pytest.approx(0.1)


def test_in_a_search_a_right_prior_is_believed_and_a_negated_one_is_not():
    table = measure(2, 12, ("right", "negated"))
    assert table["right weight"][:, 6:].mean() > 0.3
    assert table["negated weight"][:, 6:].max() == 0


@pytest.mark.slow
def test_a_right_prior_saves_trials_and_a_wrong_one_costs_at_most_a_tenth():
    table = measure(16, 40)
    assert extra(table["right"], table["none"])[2] < -0.2
    for wrong in ("unrelated", "negated"):
        assert extra(table[wrong], table["none"])[0] <= 0.1
