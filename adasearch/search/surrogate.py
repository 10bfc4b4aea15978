"""The model of the objective, and the points that look best under it. Deterministic for a seed; no wall clock.

Shape legend: N observed points, M points running, Q candidates, d features in [0, 1].
"""

from __future__ import annotations

import numpy as np
import torch
from botorch.acquisition.analytic import UpperConfidenceBound
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel, ScaleKernel

from adasearch.documents import value
from adasearch.search.gaussian import MAX_FITTED, FitError, Hyperparameters, fitted
from adasearch.search.ranking import Candidates, Proposal, numerics, ranked
from adasearch.search.shifted import Expected, Shifted

__all__ = ["Candidates", "FitError", "Observations", "Proposal", "Standard", "fit", "means", "posterior", "propose"]

MAX_POINTS = 500
CONFIDENCE = 1.0
"""So many standard deviations above its mean a point is worth trying for."""
_NOISE_FLOOR = 1e-6


@value
class Observations:
    """What is known.

    Args:
        points: N×d features of finished trials.
        scores: N scores, higher is better.
        variances: N noise variances of the scores.
        pending: M×d features of running trials.
        groups: for each column the parameter (from 0) that it belongs to: columns of one share a lengthscale. None
            gives each column its own.
        expected: what is known beforehand of the scores, see `Shifted`; None knows nothing.
    """

    points: np.ndarray
    scores: np.ndarray
    variances: np.ndarray
    pending: np.ndarray
    groups: np.ndarray | None = None
    expected: Expected | None = None


@value
class Standard:
    """Scores as the model sees them: what they differ by from what was expected, of mean 0 and deviation 1.

    Args:
        scores: N differences.
        noise: their N noise variances.
        center: mean that they had.
        spread: deviation that they had; 1 where they are all equal.
    """

    scores: np.ndarray
    noise: np.ndarray
    center: float
    spread: float


def propose(
    data: Observations, candidates: Candidates, seed: int, num: int, model: SingleTaskGP | None = None
) -> list[Proposal]:
    """Return the `num` best points, best first, by the upper confidence bound mean + `CONFIDENCE` deviations.

    Running trials count as if they had given what the model expects of them, which takes the doubt about their
    neighbourhood away and leaves the mean as it is (GP-BUCB: Desautels, Krause & Burdick 2014, section 3.2). With
    scores whose noise is as wide as their differences it finds good points sooner than noisy expected improvement: see
    benchmarks/RESULTS.md. See `ranking.ranked`.

    Args:
        data: what is known.
        candidates: where to look.
        seed: of every random draw.
        num: how many points to return.
        model: what `fit` gives for `data`; None fits it.

    Raises:
        FitError: a numerical failure.
    """
    return ranked(lambda: _acquisition(fit(data) if model is None else model, data), candidates, seed, num)


def thinned(scores: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of at most `most` observations, ascending: a third the best ones, the rest the latest."""
    n = len(scores)
    if n <= most:
        return np.arange(n)
    best = np.argsort(-scores, kind="stable")[: most // 3]
    latest = np.setdiff1d(np.arange(n), best)[-(most - len(best)) :]
    return np.sort(np.concatenate([best, latest]))


def standardised(data: Observations) -> Standard:
    """Return the scores as the model sees them."""
    left = data.scores
    if data.expected is not None:
        left = left - data.expected(torch.as_tensor(data.points, dtype=torch.float64)).detach().numpy()
    spread = float(left.std(ddof=1)) if len(left) > 1 else 0.0
    center = float(left.mean())
    spread = spread if spread > 1e-9 * max(1.0, abs(center)) else 1.0
    noise = np.maximum(data.variances / spread**2, _NOISE_FLOOR)
    return Standard(scores=(left - center) / spread, noise=noise, center=center, spread=spread)


def hyperparameters(data: Observations, standard: Standard) -> Hyperparameters:
    """Return what `gaussian.fitted` finds for standardised scores, from at most `MAX_FITTED` of them.

    Raises:
        FitError: a numerical failure.
    """
    kept = thinned(data.scores, MAX_FITTED)
    groups = np.arange(data.points.shape[1]) if data.groups is None else data.groups
    return fitted(data.points[kept], standard.scores[kept], standard.noise[kept], groups)


def posterior(data: Observations, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (Q each) of the function at Q×d points, in units of the scores.

    Raises:
        FitError: a numerical failure.
    """
    with numerics(), torch.no_grad():
        standard = standardised(data)
        found = fit(data, standard).posterior(torch.as_tensor(points, dtype=torch.float64))
        mean, variance = found.mean.squeeze(-1).numpy(), found.variance.squeeze(-1).numpy()
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise FitError("the posterior is not finite")
    return standard.center + standard.spread * mean, standard.spread * np.sqrt(variance)


def fit(data: Observations, standard: Standard | None = None) -> SingleTaskGP:
    """Return a Gaussian process of scores less the center and over the spread that `standardised` gives.

    Its mean is what was expected, where anything was, and what is fitted is what scores differ by from that.
    It is conditioned on at most `MAX_POINTS` observations, which takes cubic time.

    Args:
        data: what is known.
        standard: what `standardised` gives for it; None asks it.

    Raises:
        FitError: a numerical failure.
    """
    standard = standardised(data) if standard is None else standard
    found = hyperparameters(data, standard)
    kept = thinned(data.scores, MAX_POINTS)
    x = torch.as_tensor(data.points[kept], dtype=torch.float64)
    y = torch.as_tensor((data.scores[kept] - standard.center) / standard.spread, dtype=torch.float64).unsqueeze(-1)
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=x.shape[-1])).double()
    kernel.base_kernel.lengthscale = torch.as_tensor(found.lengthscales)
    kernel.outputscale = torch.as_tensor(found.scale)
    variances = torch.as_tensor(standard.noise[kept] + found.nugget).unsqueeze(-1)
    mean = None if data.expected is None else Shifted(data.expected, standard.spread).double()
    model = SingleTaskGP(x, y, train_Yvar=variances, covar_module=kernel, mean_module=mean, outcome_transform=None)
    model.mean_module.initialize(constant=found.mean)
    model.requires_grad_(False)  # noqa: FBT003
    model.eval()
    return model


def means(model: SingleTaskGP, points: np.ndarray) -> np.ndarray:
    """Return the model's mean (standardised) at each of Q×d points."""
    with torch.no_grad():
        found: np.ndarray = model.posterior(torch.as_tensor(points, dtype=torch.float64)).mean.squeeze(-1).numpy()
    return found


def _acquisition(model: SingleTaskGP, data: Observations) -> UpperConfidenceBound:
    if not len(data.pending):
        return UpperConfidenceBound(model, beta=CONFIDENCE**2)
    x = torch.as_tensor(data.pending, dtype=torch.float64)
    with torch.no_grad():
        expected = model.posterior(x).mean
        noise = torch.full_like(expected, float(model.likelihood.noise.median()))
        told = model.condition_on_observations(x, expected, noise=noise)
    return UpperConfidenceBound(told, beta=CONFIDENCE**2)
