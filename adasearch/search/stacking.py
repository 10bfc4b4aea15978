"""How far earlier searches are believed: regression on what they predict, and weights by what they predicted. Pure.

Legend: N trials told of this search, d feature columns, K earlier searches (sources), Z settings of a kernel.

Each source gives a prediction p (N) of the scores y. Beside the model without it, y ~ GP(a, k), stands the model with
it, y ~ GP(a + b p, k): the slope b is estimated together with the level a, and what the source does not explain is left
to the process (the autoregressive model of Kennedy & O'Hagan 2000). Both are judged by the density that they give to
each trial when they see all others, and mixed so that these densities are greatest (stacking of predictive
distributions, Yao, Vehtari, Simpson & Gelman 2018, equation 2.3).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from adasearch.documents import value
from adasearch.search.gaussian import matern
from adasearch.search.noise import excess

MIN_TOLD = 5
"""Trials before which nothing is learned of the sources and `DEFAULT_WEIGHT` is shared among them."""
DEFAULT_WEIGHT = 0.5
MIN_GAIN = 1.0
"""A source counts where it makes the trials left out, all together, at least exp(1) times likelier."""
_LATEST = 100
Setting = tuple[float, float, float]
SETTINGS: tuple[Setting, ...] = tuple(
    itertools.product((0.15, 0.3, 0.6, 1.2), (1.0, 0.3, 0.1, 0.03), (0.3, 0.1, 0.03, 0.01))
)
"""Kernels that are tried: a length in units of sqrt(d), the scale of distances between features, and the variances of
the function and of the noise that is not known."""
_ROUNDS = 300
_LEAST_WEIGHT = 0.01


@value
class Belief:
    """How far K sources are believed.

    Args:
        weights: K numbers, 0 or more, at most 1 together; what is missing to 1 is belief in this search alone.
        slopes: K numbers, 0 or more: score units of this search for one unit of the source.
    """

    weights: np.ndarray
    slopes: np.ndarray


@value
class LeftOut:
    """How well a model foretells each of N scores given all others.

    Args:
        density: log density of each (N).
        slope: last coefficient of its trend.
        setting: which of the covariances counts.
    """

    density: np.ndarray
    slope: float
    setting: int


def kernels(points: np.ndarray, noise: np.ndarray, settings: Sequence[Setting] = SETTINGS) -> np.ndarray:
    """Return Z covariances (Z×N×N) of standardised scores, Matérn 5/2.

    Args:
        points: N×d features in [0, 1].
        noise: N known noise variances.
        settings: Z settings.
    """
    n, d = points.shape
    lengths, signals, nuggets = (np.array(column)[:, None, None] for column in zip(*settings, strict=True))
    squared = ((points[:, None, :] - points[None, :, :]) ** 2).sum(-1) / d
    unit, _ = matern(squared / lengths**2)
    return np.asarray(signals * unit + (nuggets + noise) * np.eye(n))


def left_out(covariances: np.ndarray, trend: np.ndarray, scores: np.ndarray) -> LeftOut:
    """Return how well a Gaussian process around a linear trend foretells each score given all others.

    The trend is estimated anew without the score (Dubrule 1983: with Q = A - A H (H'A H)^-1 H'A and A the inverse
    covariance, the error is (Q y)_i / Q_ii and its variance 1 / Q_ii). Of the Z covariances the one of greatest
    restricted likelihood counts (Rasmussen & Williams 2006, equation 2.45).

    Args:
        covariances: Z×N×N.
        trend: N×p columns whose coefficients have no prior; p < N.
        scores: N.
    """
    inverse = np.linalg.inv(covariances)
    weighted = inverse @ trend
    normal = trend.T @ weighted
    q = inverse - weighted @ np.linalg.solve(normal, np.swapaxes(weighted, -1, -2))
    error, precision = q @ scores, np.maximum(np.diagonal(q, axis1=-2, axis2=-1), 1e-12)
    likelihood = -0.5 * (np.linalg.slogdet(covariances)[1] + np.linalg.slogdet(normal)[1] + error @ scores)
    best = int(np.argmax(likelihood))
    slope = np.linalg.solve(normal[best], weighted[best].T @ scores)[-1]
    density = 0.5 * (np.log(precision[best]) - error[best] ** 2 / precision[best] - math.log(2 * math.pi))
    return LeftOut(density=density, slope=float(slope), setting=best)


def stacked(densities: np.ndarray) -> np.ndarray:
    """Return the weights (K) of a mixture under which the log densities (K×N) are greatest together.

    By expectation maximisation from equal weights; the problem is concave, so that this is the maximum.
    """
    ratios = np.exp(densities - densities.max(axis=0))
    weights = np.full(len(densities), 1.0 / len(densities))
    for _ in range(_ROUNDS):
        parts = weights[:, None] * ratios
        weights = (parts / parts.sum(axis=0)).mean(axis=1)
    return weights


def believed(predictions: np.ndarray, points: np.ndarray, scores: np.ndarray, variances: np.ndarray) -> Belief:
    """Return how far sources are believed, given what was told.

    A source whose slope is not positive, or that predicts the scores no better than this search does without it (see
    `MIN_GAIN`), has weight 0 exactly.

    Args:
        predictions: K×N, what each source expects at the points, in its own units.
        points: N×d features.
        scores: N, higher is better.
        variances: N squared standard errors; what is common to all moves no comparison and is left out.
    """
    sources = len(predictions)
    points, scores, variances = points[-_LATEST:], scores[-_LATEST:], variances[-_LATEST:]
    predictions = predictions[:, -_LATEST:]
    weights, slopes = np.zeros(sources), np.zeros(sources)
    spread = float(scores.std()) if len(scores) else 0.0
    if spread <= 0:
        return Belief(weights=weights, slopes=slopes)
    standard = (scores - scores.mean()) / spread
    covariances = kernels(points, excess(variances) / spread**2)
    level = np.ones((len(scores), 1))
    alone = left_out(covariances, level, standard).density
    kept, densities = [], [alone]
    for k, prediction in enumerate(predictions):
        if prediction.std() <= 1e-9:
            continue
        found = left_out(covariances, np.column_stack([level, prediction]), standard)
        if found.slope > 0 and found.density.sum() - alone.sum() >= MIN_GAIN:
            kept.append(k)
            densities.append(found.density)
            slopes[k] = found.slope * spread
    if kept:
        shares = stacked(np.array(densities))[1:]
        weights[kept] = np.where(shares < _LEAST_WEIGHT, 0.0, shares)
    return Belief(weights=weights, slopes=np.where(weights > 0, slopes, 0.0))
