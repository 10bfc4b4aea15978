import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import multivariate_normal

from adasearch.search import gaussian
from adasearch.search.gaussian import FitError, Hyperparameters, fitted, matern, squared_distances


def data_of(n=24, d=5, seed=0):
    rng = np.random.default_rng(seed)
    points = rng.random((n, d))
    scores = np.sin(4 * points[:, 0]) + points[:, 1] + 0.05 * rng.standard_normal(n)
    return points, (scores - scores.mean()) / scores.std()


def test_the_kernel_is_that_of_gpytorch():
    torch, kernels = pytest.importorskip("torch"), pytest.importorskip("gpytorch").kernels
    points, lengths = data_of()[0], np.array([0.2, 0.4, 1.0, 3.0, 0.7])
    theirs = kernels.MaternKernel(nu=2.5, ard_num_dims=5).double()
    theirs.lengthscale = torch.as_tensor(lengths)
    q = (1 / lengths**2) @ squared_distances(points, np.arange(5))
    ours = matern(q)[0].reshape(24, 24)
    assert np.allclose(ours, theirs(torch.as_tensor(points)).to_dense().detach().numpy(), atol=1e-9)


def test_distances_add_up_within_groups():
    points = data_of()[0]
    found = squared_distances(points, np.array([0, 1, 1, 0, 2]))
    assert found.shape == (3, 24 * 24)
    assert np.allclose(found[1].reshape(24, 24), cdist(points[:, 1:3], points[:, 1:3]) ** 2)


def test_the_density_is_that_of_the_normal_distribution_and_the_priors():
    points, scores = data_of(n=12)
    noise = np.linspace(0.01, 0.1, 12)
    density = gaussian._Posterior(squared_distances(points, np.arange(5)), scores, noise)

    def expected(theta):
        q = np.exp(-2 * theta[:5]) @ squared_distances(points, np.arange(5))
        cov = np.exp(theta[5]) * matern(q)[0].reshape(12, 12) + np.diag(noise + np.exp(theta[6]) + 1e-8)
        return multivariate_normal(np.full(12, theta[7]), cov).logpdf(scores)

    one, two = (np.random.default_rng(i).normal(0, 0.5, 8) for i in (1, 2))
    prior = density._prior(two)[0] - density._prior(one)[0]
    assert density(one)[0] - density(two)[0] == pytest.approx(expected(two) - expected(one) + prior)


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_the_density(seed):
    points, scores = data_of(n=15, seed=seed)
    density = gaussian._Posterior(squared_distances(points, np.array([0, 1, 1, 2, 3])), scores, np.full(15, 0.02))
    theta = np.random.default_rng(seed).normal(0, 0.5, 7)
    steps = 1e-5 * np.eye(7)
    numeric = np.array([(density(theta + e)[0] - density(theta - e)[0]) / 2e-5 for e in steps])
    assert np.allclose(density(theta)[1], numeric, rtol=1e-4, atol=1e-5)


def test_what_matters_gets_short_lengthscales():
    points, scores = data_of(n=60)
    found = fitted(points, scores, np.full(60, 0.003), np.arange(5))
    assert isinstance(found, Hyperparameters)
    assert found.lengthscales[0] < found.lengthscales[1] < found.lengthscales[2:].min()
    assert found.nugget < 0.05


def test_pure_noise_is_taken_for_noise():
    points = data_of(n=60)[0]
    scores = np.random.default_rng(1).standard_normal(60)
    found = fitted(points, scores, np.full(60, 1.0), np.arange(5))
    assert found.scale < 0.8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    points, scores = data_of()
    scores[3] = bad
    with pytest.raises(FitError, match="finite"):
        fitted(points, scores, np.zeros(24), np.arange(5))
