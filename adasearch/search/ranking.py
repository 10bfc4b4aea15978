"""Which of many points a model likes best: all are valued, the best are moved uphill and valued again.

Shape legend: Q candidates, S of them moved, d features in [0, 1].
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.exceptions.errors import BotorchError
from botorch.generation.gen import gen_candidates_scipy
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from adasearch.documents import value
from adasearch.search.gaussian import FitError

_NUM_STARTS = 4
_ASCENT_STEPS = 20
_AT_ONCE = 64


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


@contextlib.contextmanager
def numerics(seed: int = 0) -> Iterator[None]:
    """Do what BoTorch does with random numbers of its own, without its warnings; what fails in it is a `FitError`."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            yield
        except (BotorchError, NanError, NotPSDError, RuntimeError, ValueError) as error:
            raise FitError(f"{type(error).__name__}: {error}") from error


def ranked(make: Callable[[], AcquisitionFunction], candidates: Candidates, seed: int, num: int) -> list[Proposal]:
    """Return the `num` points of the greatest acquisition value, best first.

    The best candidates are moved uphill along their free columns, rounded by `snap`, and compared again.

    Args:
        make: gives the acquisition function, of points S×1×d.
        candidates: where to look.
        seed: of every random draw.
        num: how many points to return.

    Raises:
        FitError: a numerical failure.
    """
    points = candidates.points
    with numerics(seed):
        gain = make()
        values = _valued(gain, points)
        best = np.argsort(-values, kind="stable")[:_NUM_STARTS]
        moved = _ascended(gain, points[best], candidates.free[best], candidates.reach)
        snapped = np.array([candidates.snap(int(i), row) for i, row in zip(best, moved, strict=True)])
        values = np.concatenate([values, _valued(gain, snapped)])
    if not np.isfinite(values).all():
        raise FitError("the acquisition function is not finite")
    rows, index = np.concatenate([points, snapped]), np.concatenate([np.arange(len(points)), best])
    order = np.argsort(-values, kind="stable")[:num]
    return [Proposal(index=int(index[i]), features=rows[i]) for i in order]


def _valued(gain: AcquisitionFunction, points: np.ndarray) -> np.ndarray:
    """Return the acquisition value (Q) of each of Q×d points."""
    x = torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2)
    with torch.no_grad():
        return torch.cat([gain(part) for part in torch.split(x, _AT_ONCE)]).numpy()


def _ascended(gain: AcquisitionFunction, starts: np.ndarray, free: np.ndarray, reach: float) -> np.ndarray:
    """Return starts (S×d) moved uphill along their free columns, by at most `reach` and within [0, 1]."""
    if not free.any():
        return starts
    x = torch.as_tensor(starts, dtype=torch.float64).unsqueeze(-2)
    room = torch.as_tensor(free).unsqueeze(-2).double() * reach
    lower, upper = (x - room).clamp(0.0, 1.0), (x + room).clamp(0.0, 1.0)
    moved: Tensor
    moved, _ = gen_candidates_scipy(
        x, gain, lower_bounds=lower, upper_bounds=upper, options={"maxiter": _ASCENT_STEPS}, use_parallel_mode=False
    )
    return moved.detach().squeeze(-2).numpy()
