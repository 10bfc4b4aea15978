"""Hyperparameters of a Gaussian process by maximum a posteriori, with gradients written by hand. Pure, no torch.

Legend: N points, d feature columns, G groups of columns that share a lengthscale (the columns of one parameter).

The kernel is Matérn's of smoothness 5/2 (Rasmussen & Williams 2006, equation 4.17): with q the sum over groups of
squared distances over squared lengthscales and r = sqrt(5 q), k = s (1 + r + r^2 / 3) exp(-r).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize

from adasearch.documents import value

MAX_FITTED = 250
"""Points that hyperparameters are fitted to; the model is then conditioned on all."""
_STEPS = 60
_JITTER = 1e-8
_LENGTH_STD, _SCALE_STD = math.sqrt(3.0), 0.7
_NUGGET_MODE, _NUGGET_STD = -5.0, 1.0
_BOUND = 12.0


@value
class Hyperparameters:
    """Of a Gaussian process over standardised scores.

    Args:
        lengthscales: one for each of the d columns.
        scale: variance of the function.
        nugget: variance of what neither the function nor the known noise explains, such as the luck of a recovery.
        mean: of the function, before any prior mean.
    """

    lengthscales: np.ndarray
    scale: float
    nugget: float
    mean: float


class FitError(ArithmeticError):
    """The model could not be fitted or searched; another way of proposing must be taken."""


def matern(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernel of unit variance at squared scaled distances, and its derivative by them."""
    r = np.sqrt(5.0 * np.maximum(q, 0.0))
    fall = np.exp(-r)
    return (1.0 + r + r * r / 3.0) * fall, -(5.0 / 6.0) * (1.0 + r) * fall


def squared_distances(points: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return G x N^2 squared distances between all pairs, summed within each group of columns.

    Args:
        points: N x d.
        groups: for each column the index of its group, d integers that count from 0 without gaps.
    """
    n = len(points)
    found = np.zeros((int(groups.max()) + 1 if len(groups) else 0, n * n))
    for column, group in enumerate(groups):
        x = points[:, column]
        found[group] += np.square(x[:, None] - x[None, :]).ravel()
    return found


class _Posterior:
    """Log posterior density of log-lengthscales (G), log scale, log nugget and mean, with its gradient.

    Priors: lengthscale ~ log-normal(sqrt 2 + log(G) / 2, 3), which makes functions of many parameters smooth in each of
    them, and nugget ~ log-normal(-4, 1), both as densities of the value and not of its logarithm, so that their modes
    are those of Hvarfner et al. 2024 (arXiv 2402.02229): 0.2 sqrt(G) and exp(-5);
    log scale ~ N(0, 0.5); mean ~ N(0, 1).
    """

    def __init__(self, distances: np.ndarray, scores: np.ndarray, noise: np.ndarray) -> None:
        self._distances, self._scores, self._noise = distances, scores, noise
        # exp(-(z - m)^2 / 2 s^2) / exp(z) is, but for a constant, exp(-(z - m + s^2)^2 / 2 s^2)
        self._centre = math.sqrt(2.0) + 0.5 * math.log(max(1, len(distances))) - _LENGTH_STD**2

    @property
    def starts(self) -> tuple[np.ndarray, ...]:
        """Return where the ascent begins: at the mode of the lengthscales' prior, and where functions are smoother."""
        groups = len(self._distances)
        return tuple(
            np.concatenate([np.full(groups, self._centre + shift), [0.0, _NUGGET_MODE, 0.0]]) for shift in (0.0, 1.5)
        )

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative log density and its gradient (G + 3)."""
        groups, n = len(self._distances), len(self._scores)
        inverse = np.exp(-2.0 * theta[:groups])
        scale, nugget, mean = math.exp(theta[groups]), math.exp(theta[groups + 1]), theta[groups + 2]
        unit, slope = matern(inverse @ self._distances)
        kernel = (scale * unit).reshape(n, n)
        kernel.flat[:: n + 1] += self._noise + nugget + _JITTER
        factor = cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
        centred = self._scores - mean
        alpha = cho_solve(factor, centred, check_finite=False)
        weights = np.outer(alpha, alpha) - cho_solve(factor, np.eye(n), check_finite=False)
        log_det = 2.0 * float(np.log(np.diagonal(factor[0])).sum())
        density = -0.5 * float(centred @ alpha) - 0.5 * log_det
        flat = weights.ravel()
        by_length = -scale * (self._distances @ (flat * slope)) * inverse
        by_scale = 0.5 * scale * float(flat @ unit)
        by_nugget = 0.5 * nugget * float(np.trace(weights))
        gradient = np.concatenate([by_length, [by_scale, by_nugget, float(alpha.sum())]])
        prior, prior_gradient = self._prior(theta)
        return -(density + prior), -(gradient + prior_gradient)

    def _prior(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        groups = len(self._distances)
        centre = np.concatenate([np.full(groups, self._centre), [0.0, _NUGGET_MODE, 0.0]])
        spread = np.concatenate([np.full(groups, _LENGTH_STD), [_SCALE_STD, _NUGGET_STD, 1.0]])
        z = (theta - centre) / spread
        return -0.5 * float(z @ z), -z / spread


def fitted(points: np.ndarray, scores: np.ndarray, noise: np.ndarray, groups: np.ndarray) -> Hyperparameters:
    """Return the hyperparameters of greatest posterior density, the better of two ascents.

    Args:
        points: N x d features.
        scores: N standardised scores.
        noise: N known noise variances of them.
        groups: for each column the index of its group.

    Raises:
        FitError: what was given is not finite, or no ascent ended at finite values.
    """
    if not (np.isfinite(points).all() and np.isfinite(scores).all() and np.isfinite(noise).all()):
        raise FitError("points, scores and noise must be finite")
    density = _Posterior(squared_distances(points, groups), scores, noise)
    best: tuple[float, np.ndarray] | None = None
    for start in density.starts:
        try:
            found = minimize(density, start, jac=True, method="L-BFGS-B", bounds=[(-_BOUND, _BOUND)] * len(start),
                             options={"maxiter": _STEPS})  # fmt: skip
        except np.linalg.LinAlgError:
            continue
        if math.isfinite(found.fun) and (best is None or found.fun < best[0]):
            best = float(found.fun), found.x
    if best is None:
        raise FitError("the covariance is not positive definite")
    theta, count = best[1], len(best[1]) - 3
    return Hyperparameters(
        lengthscales=np.exp(theta[:count])[groups],
        scale=math.exp(theta[count]),
        nugget=math.exp(theta[count + 1]),
        mean=float(theta[count + 2]),
    )
