"""How far earlier searches are believed: the formulas against brute force, and the weights that come of them."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from adasearch.search.stacking import MIN_GAIN, believed, kernels, left_out, stacked


def bowl(points, centre):
    return -((points - centre) ** 2).sum(1)


def sample(n=12, d=4, seed=0, noise=0.02):
    rng = np.random.default_rng(seed)
    points = rng.random((n, d))
    return points, bowl(points, 0.3) + noise * rng.standard_normal(n)


def test_kernels_are_the_formula_at_a_pair():
    points = np.array([[0.1, 0.5], [0.4, 0.9]])
    made = kernels(points, np.array([0.0, 0.2]))
    assert made.shape == (64, 2, 2)
    r = np.sqrt(5 * (0.3**2 + 0.4**2) / 2) / 0.15
    assert made[0, 0, 1] == pytest.approx((1 + r + r * r / 3) * np.exp(-r))
    assert made[0, 1, 1] - made[0, 0, 0] == pytest.approx(0.2)
    assert made[0, 0, 0] == pytest.approx(1.0 + 0.3)
    np.linalg.cholesky(made)


def test_leaving_out_is_what_fitting_again_without_the_trial_gives():
    points, scores = sample(7)
    covariance = kernels(points, np.zeros(7))[5:6]
    trend = np.column_stack([np.ones(7), bowl(points, 0.5)])
    found = left_out(covariance, trend, scores)
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        k, h = covariance[0][np.ix_(rest, rest)], trend[rest]
        inverse = np.linalg.inv(k)
        spread = np.linalg.inv(h.T @ inverse @ h)
        beta = spread @ h.T @ inverse @ scores[rest]
        cross = covariance[0][i, rest] @ inverse
        mean = trend[i] @ beta + cross @ (scores[rest] - h @ beta)
        gap = trend[i] - cross @ h
        variance = covariance[0][i, i] - cross @ covariance[0][rest, i] + gap @ spread @ gap
        assert found.density[i] == pytest.approx(multivariate_normal.logpdf(scores[i], mean, variance))


def test_the_setting_that_counts_has_the_greatest_density_of_contrasts():
    """The restricted likelihood is the density of what the trend leaves over, whichever basis it is written in."""
    points, scores = sample(6)
    covariances, trend = kernels(points, np.zeros(6)), np.ones((6, 1))
    basis = np.linalg.svd(np.eye(6) - 1 / 6)[0][:, :5]
    densities = [multivariate_normal.logpdf(basis.T @ scores, cov=basis.T @ c @ basis) for c in covariances]
    assert left_out(covariances, trend, scores).setting == int(np.argmax(densities))


def test_stacking_finds_the_best_mixture():
    densities = np.random.default_rng(0).normal(size=(3, 9))
    weights = stacked(densities)
    assert weights.sum() == pytest.approx(1)

    def loss(free):
        w = np.exp(free) / np.exp(free).sum()
        return -np.log(w @ np.exp(densities)).sum()

    best = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 4000})
    assert -np.log(weights @ np.exp(densities)).sum() == pytest.approx(best.fun, abs=1e-3)


def test_the_right_source_is_believed_and_the_negated_one_not_at_all():
    points, scores = sample()
    predictions = np.array([bowl(points, 0.35), -bowl(points, 0.3)]) * 2.0
    found = believed(predictions, points, scores, np.zeros(12))
    assert found.weights[0] > 0.9
    assert found.weights[1] == 0
    assert found.slopes[0] == pytest.approx(0.5, rel=0.2)
    assert found.slopes[1] == 0


def test_an_unrelated_source_is_seldom_believed():
    believed_ones = 0
    for seed in range(20):
        points, scores = sample(10, seed=seed)
        other = np.random.default_rng(100 + seed).normal(size=4)
        found = believed(np.sin(6 * points @ other)[None], points, scores, np.zeros(10))
        believed_ones += bool(found.weights[0])
    assert believed_ones <= 3


def test_a_source_counts_only_from_the_least_gain_on(monkeypatch):
    points, scores = sample()
    predictions = bowl(points, 0.35)[None]
    level = np.ones((12, 1))
    standard = (scores - scores.mean()) / scores.std()
    covariances = kernels(points, np.zeros(12))
    gain = (
        left_out(covariances, np.column_stack([level, predictions[0]]), standard).density
        - left_out(covariances, level, standard).density
    ).sum()
    assert gain > MIN_GAIN
    monkeypatch.setattr("adasearch.search.stacking.MIN_GAIN", gain + 1e-6)
    assert believed(predictions, points, scores, np.zeros(12)).weights[0] == 0


@pytest.mark.parametrize("scores", [np.zeros(8), np.full(8, 3.0)])
def test_scores_without_spread_and_flat_sources_teach_nothing(scores):
    points = sample(8)[0]
    assert believed(np.ones((1, 8)), points, scores, np.zeros(8)).weights.tolist() == [0]
    assert believed(np.ones((1, 8)), *sample(8), np.zeros(8)).weights.tolist() == [0]


def test_a_noisy_trial_counts_less():
    points, scores = sample(12)
    wrong = scores.copy()
    wrong[0] += 3.0
    noisy = np.zeros(12)
    noisy[0] = 9.0
    prediction = bowl(points, 0.3)[None]

    def slope(variances):
        return believed(prediction, points, wrong, variances).slopes[0]

    assert abs(slope(noisy) - 1) < abs(slope(np.zeros(12)) - 1)
