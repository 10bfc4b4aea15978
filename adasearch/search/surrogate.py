"""The model of the objective, and the points that look best under it. Deterministic for a seed; no wall clock.

Shape legend: N observed points, M points running, Q candidates, d features in [0, 1].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.exceptions.errors import BotorchError
from botorch.generation.gen import gen_candidates_scipy
from botorch.models import SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.kernels import MaternKernel, ScaleKernel
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from adasearch.documents import value
from adasearch.search.gaussian import MAX_FITTED, FitError, Hyperparameters, fitted
from adasearch.search.shifted import Expected, Shifted

__all__ = ["Candidates", "FitError", "Observations", "Proposal", "fit", "means", "posterior", "propose"]

MAX_POINTS, MAX_BASELINE = 500, 60
_NUM_DRAWS = 64
_NUM_STARTS = 4
_ASCENT_STEPS = 20
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
class Proposal:
    """A point worth trying: the candidate `index`, as it was or moved to `features` (d)."""

    index: int
    features: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Points to choose from, and how they may be moved.

    Args:
        points: Q×d features.
        free: Q×d bool, the columns of each candidate that may be moved.
        snap: candidate index and features (d) -> the features (d) of the nearest point that exists.
        reach: how far a column may be moved.
    """

    points: np.ndarray
    free: np.ndarray
    snap: Callable[[int, np.ndarray], np.ndarray]
    reach: float = 1.0


def propose(
    data: Observations, candidates: Candidates, seed: int, num: int, model: SingleTaskGP | None = None
) -> list[Proposal]:
    """Return the `num` best points, best first, by noisy expected improvement on what is known and running.

    The improvement is on the best of the known points under the model, not on the luckiest observation (Letham et al.
    2019; Ament et al. 2023, arXiv 2310.20708). The best candidates are moved uphill along their free columns, rounded,
    and compared again.

    Args:
        data: what is known.
        candidates: where to look.
        seed: of every random draw.
        num: how many points to return.
        model: what `fit` gives for `data`; None fits it.

    Raises:
        FitError: a numerical failure.
    """
    points = candidates.points
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            gain = _acquisition(fit(data) if model is None else model, data, seed)
            values = _evaluated(gain, points)
            best = np.argsort(-values, kind="stable")[:_NUM_STARTS]
            moved = _ascended(gain, points[best], candidates.free[best], candidates.reach)
            snapped = np.array([candidates.snap(int(i), row) for i, row in zip(best, moved, strict=True)])
            values = np.concatenate([values, _evaluated(gain, snapped)])
        except (BotorchError, NanError, NotPSDError, RuntimeError, ValueError) as error:
            raise FitError(f"{type(error).__name__}: {error}") from error
    if not np.isfinite(values).all():
        raise FitError("the acquisition function is not finite")
    rows, index = np.concatenate([points, snapped]), np.concatenate([np.arange(len(points)), best])
    order = np.argsort(-values, kind="stable")[:num]
    return [Proposal(index=int(index[i]), features=rows[i]) for i in order]


def thinned(scores: np.ndarray, most: int) -> np.ndarray:
    """Return the indices of at most `most` observations, ascending: a third the best ones, the rest the latest."""
    n = len(scores)
    if n <= most:
        return np.arange(n)
    best = np.argsort(-scores, kind="stable")[: most // 3]
    latest = np.setdiff1d(np.arange(n), best)[-(most - len(best)) :]
    return np.sort(np.concatenate([best, latest]))


def standardised(data: Observations) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return what scores differ by from what was expected, standardised, and how that was done.

    Returns:
        N differences of mean 0 and deviation 1, their N noise variances, and the mean and deviation that were.
    """
    left = data.scores
    if data.expected is not None:
        left = left - data.expected(torch.as_tensor(data.points, dtype=torch.float64)).detach().numpy()
    spread = float(left.std(ddof=1)) if len(left) > 1 else 0.0
    mean = float(left.mean())
    spread = spread if spread > 1e-9 * max(1.0, abs(mean)) else 1.0
    return (left - mean) / spread, np.maximum(data.variances / spread**2, _NOISE_FLOOR), mean, spread


def hyperparameters(data: Observations) -> Hyperparameters:
    """Return what `gaussian.fitted` finds for standardised scores, from at most `MAX_FITTED` of them.

    Raises:
        FitError: a numerical failure.
    """
    scores, noise, _, _ = standardised(data)
    kept = thinned(data.scores, MAX_FITTED)
    groups = np.arange(data.points.shape[1]) if data.groups is None else data.groups
    return fitted(data.points[kept], scores[kept], noise[kept], groups)


def posterior(data: Observations, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (Q each) of the function at Q×d points, in units of the scores.

    Raises:
        FitError: a numerical failure.
    """
    _, _, center, spread = standardised(data)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            model = fit(data)
            with torch.no_grad():
                found = model.posterior(torch.as_tensor(points, dtype=torch.float64))
                mean, variance = found.mean.squeeze(-1).numpy(), found.variance.squeeze(-1).numpy()
        except (BotorchError, NanError, NotPSDError, RuntimeError, ValueError) as error:
            raise FitError(f"{type(error).__name__}: {error}") from error
    if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
        raise FitError("the posterior is not finite")
    return center + spread * mean, spread * np.sqrt(variance)


def fit(data: Observations) -> SingleTaskGP:
    """Return a Gaussian process of scores less ``center`` and over ``spread``, which `standardised` gives.

    Its mean is what was expected, where anything was, and what is fitted is what scores differ by from that.
    It is conditioned on at most `MAX_POINTS` observations, which takes cubic time.

    Raises:
        FitError: a numerical failure.
    """
    found = hyperparameters(data)
    _, noise, center, spread = standardised(data)
    kept = thinned(data.scores, MAX_POINTS)
    noise = noise[kept]
    x = torch.as_tensor(data.points[kept], dtype=torch.float64)
    y = torch.as_tensor((data.scores[kept] - center) / spread, dtype=torch.float64).unsqueeze(-1)
    kernel = ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=x.shape[-1])).double()
    kernel.base_kernel.lengthscale = torch.as_tensor(found.lengthscales)
    kernel.outputscale = torch.as_tensor(found.scale)
    variances = torch.as_tensor(noise + found.nugget).unsqueeze(-1)
    mean = None if data.expected is None else Shifted(data.expected, spread).double()
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


def _acquisition(model: SingleTaskGP, data: Observations, seed: int) -> qLogNoisyExpectedImprovement:
    pending = torch.as_tensor(data.pending, dtype=torch.float64) if len(data.pending) else None
    kept = thinned(means(model, data.points), MAX_BASELINE)
    return qLogNoisyExpectedImprovement(
        model=model,
        X_baseline=torch.as_tensor(data.points[kept], dtype=torch.float64),
        sampler=SobolQMCNormalSampler(torch.Size([_NUM_DRAWS]), seed=seed % 2**31),
        prune_baseline=True,
        X_pending=pending,
    )


def _evaluated(gain: qLogNoisyExpectedImprovement, points: np.ndarray) -> np.ndarray:
    """Return the acquisition value (Q) of each of Q×d points."""
    x = torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2)
    with torch.no_grad():
        return torch.cat([gain(part) for part in torch.split(x, 128)]).numpy()


def _ascended(gain: qLogNoisyExpectedImprovement, starts: np.ndarray, free: np.ndarray, reach: float) -> np.ndarray:
    """Return starts (S×d) moved uphill along their free columns, by at most `reach` and within [0, 1]."""
    if not free.any():
        return starts
    x = torch.as_tensor(starts, dtype=torch.float64).unsqueeze(-2)
    mask = torch.as_tensor(free).unsqueeze(-2)
    room = mask.double() * reach
    lower, upper = (x - room).clamp(0.0, 1.0), (x + room).clamp(0.0, 1.0)
    moved: Tensor
    moved, _ = gen_candidates_scipy(
        x, gain, lower_bounds=lower, upper_bounds=upper, options={"maxiter": _ASCENT_STEPS}, use_parallel_mode=False
    )
    return moved.detach().squeeze(-2).numpy()
