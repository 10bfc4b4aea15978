"""The model of the objective, and the points that look best under it. Deterministic for a seed; no wall clock.

Shape legend: N observed points, M points running, Q candidates, d features in [0, 1].
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.exceptions.errors import BotorchError
from botorch.fit import fit_gpytorch_mll
from botorch.generation.gen import gen_candidates_scipy
from botorch.models import SingleTaskGP
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.constraints import GreaterThan
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from adasearch.documents import value
from adasearch.search.shifted import Expected, Shifted

MAX_POINTS = 300
_KEPT_BEST = 100
_NUM_DRAWS = 64
_NUM_STARTS = 4
_FIT_STEPS = 100
_ASCENT_STEPS = 30
_NOISE_FLOOR = 1e-6


class FitError(ArithmeticError):
    """The model could not be fitted or searched; another way of proposing must be taken."""


@value
class Observations:
    """What is known.

    Args:
        points: N×d features of finished trials.
        scores: N scores, higher is better.
        variances: N squared standard errors of the scores.
        pending: M×d features of running trials.
        expected: what is known beforehand of the scores, see `Shifted`; None knows nothing.
    """

    points: np.ndarray
    scores: np.ndarray
    variances: np.ndarray
    pending: np.ndarray
    expected: Expected | None = None


@value
class Proposal:
    """A point worth trying: the candidate `index`, as it was or moved to `features` (d)."""

    index: int
    features: np.ndarray


def propose(
    data: Observations,
    candidates: np.ndarray,
    free: np.ndarray,
    snap: Callable[[int, np.ndarray], np.ndarray],
    seed: int,
    num: int,
) -> list[Proposal]:
    """Return the `num` best points, best first, by noisy expected improvement on what is known and running.

    The best candidates are moved uphill along their free columns, rounded by `snap`, and compared again.

    Args:
        data: what is known.
        candidates: Q×d features.
        free: Q×d bool, the columns of each candidate that may be moved.
        snap: candidate index and features (d) -> the features (d) of the nearest point that exists.
        seed: of every random draw.
        num: how many points to return.

    Raises:
        FitError: a numerical failure.
    """
    rounded, index = candidates, np.arange(len(candidates))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            gain = _acquisition(_thinned(data), seed)
            values = _evaluated(gain, candidates)
            best = np.argsort(-values, kind="stable")[:_NUM_STARTS]
            moved = _ascended(gain, candidates[best], free[best])
            snapped = np.array([snap(int(i), row) for i, row in zip(best, moved, strict=True)])
            values = np.concatenate([values, _evaluated(gain, snapped)])
        except (BotorchError, NanError, NotPSDError, RuntimeError, ValueError) as error:
            raise FitError(f"{type(error).__name__}: {error}") from error
    if not np.isfinite(values).all():
        raise FitError("the acquisition function is not finite")
    rounded, index = np.concatenate([rounded, snapped]), np.concatenate([index, best])
    order = np.argsort(-values, kind="stable")[:num]
    return [Proposal(index=int(index[i]), features=rounded[i]) for i in order]


def _thinned(data: Observations) -> Observations:
    """Return at most `MAX_POINTS` observations, the best ones and the latest ones; a fit takes cubic time."""
    n = len(data.scores)
    if n <= MAX_POINTS:
        return data
    best = set(np.argsort(-data.scores, kind="stable")[:_KEPT_BEST].tolist())
    latest = [i for i in range(n - 1, -1, -1) if i not in best][: MAX_POINTS - _KEPT_BEST]
    keep = sorted([*best, *latest])
    return dataclasses.replace(data, points=data.points[keep], scores=data.scores[keep], variances=data.variances[keep])


def fit(data: Observations) -> SingleTaskGP:
    """Return a Gaussian process fitted to standardised scores, or to what they differ by from what was expected.

    All trials are scored on the same items, so most of a score's standard error is common to all of them and moves
    no comparison; how much is left is fitted (prior of Hvarfner et al. 2024, arXiv 2402.02229, as in BoTorch). What
    the variance of a trial that was scored on fewer items exceeds the least one by is known, and given.
    """
    x = torch.as_tensor(data.points, dtype=torch.float64)
    left = data.scores if data.expected is None else data.scores - data.expected(x).numpy()
    spread = float(left.std(ddof=1)) if len(left) > 1 else 0.0
    spread = spread if spread > 0 else 1.0
    y = torch.as_tensor((data.scores - left.mean()) / spread, dtype=torch.float64).unsqueeze(-1)
    excess = np.maximum(data.variances - data.variances.min(), 0.0) / spread**2
    noise = torch.as_tensor(excess, dtype=torch.float64).clamp_min(_NOISE_FLOOR)
    prior = LogNormalPrior(loc=-4.0, scale=1.0)
    likelihood = FixedNoiseGaussianLikelihood(
        noise=noise,
        learn_additional_noise=True,
        noise_prior=prior,
        noise_constraint=GreaterThan(1e-4, transform=None, initial_value=prior.mode),
    )
    mean = None if data.expected is None else Shifted(data.expected, spread)
    known = {"train_Yvar": noise.unsqueeze(-1), "likelihood": likelihood, "mean_module": mean}
    model = SingleTaskGP(x, y, outcome_transform=None, **known)
    mll = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": _FIT_STEPS}})
    return model


def _acquisition(data: Observations, seed: int) -> qLogNoisyExpectedImprovement:
    model = fit(data)
    pending = torch.as_tensor(data.pending, dtype=torch.float64) if len(data.pending) else None
    return qLogNoisyExpectedImprovement(
        model=model,
        X_baseline=torch.as_tensor(data.points, dtype=torch.float64),
        sampler=SobolQMCNormalSampler(torch.Size([_NUM_DRAWS]), seed=seed % 2**31),
        prune_baseline=True,
        X_pending=pending,
    )


def _evaluated(gain: qLogNoisyExpectedImprovement, points: np.ndarray) -> np.ndarray:
    """Return the acquisition value (Q) of each of Q×d points."""
    x = torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2)
    with torch.no_grad():
        return torch.cat([gain(part) for part in torch.split(x, 128)]).numpy()


def _ascended(gain: qLogNoisyExpectedImprovement, starts: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return starts (S×d) moved uphill along their free columns, within [0, 1]."""
    if not free.any():
        return starts
    x = torch.as_tensor(starts, dtype=torch.float64).unsqueeze(-2)
    mask = torch.as_tensor(free).unsqueeze(-2)
    lower, upper = torch.where(mask, torch.zeros_like(x), x), torch.where(mask, torch.ones_like(x), x)
    moved: Tensor
    moved, _ = gen_candidates_scipy(
        x, gain, lower_bounds=lower, upper_bounds=upper, options={"maxiter": _ASCENT_STEPS}, use_parallel_mode=False
    )
    return moved.detach().squeeze(-2).numpy()
