"""The next trial where several things count at once: by the volume that it is expected to add to the front.

With one objective under constraints it is the one of the greatest expected improvement that keeps them.

Shape legend: N observed points, M points running, Q candidates, d features in [0, 1], m objectives, c constraints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import LinearMCObjective
from botorch.exceptions.errors import BotorchError
from botorch.generation.gen import gen_candidates_scipy
from botorch.models.model_list_gp_regression import ModelListGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

from adasearch.documents import value
from adasearch.pareto import front, normalised, spread
from adasearch.search.parameters import Encoding
from adasearch.search.surrogate import FitError, Observations, Proposal, fit

MAX_POINTS = 300
NUM_PARENTS = 8
_DRAWS = {1: 64, 2: 64, 3: 32}
_LEAST_DRAWS = 16
_NUM_STARTS = 4
_ASCENT_STEPS = 30
_LEAST_ROOM = 0.1

# BoTorch would compile a kernel of its own at the first proposal: a minute and more than a gigabyte on a small machine,
# and figures that depend on there being a compiler
logei._load_attempted = True

Gain = qLogNoisyExpectedImprovement | qLogNoisyExpectedHypervolumeImprovement
Snap = Callable[[int, np.ndarray], np.ndarray]
Params = dict[str, Any]


@value
class Results:
    """What is known of finished trials, and what runs.

    Args:
        points: N×d features.
        objectives: N×m, all of them better the higher they are.
        variances: N×m, squared standard errors of the same; 0 where nothing is measured.
        constraints: N×c, 0 or less where the point is feasible; c may be 0.
        pending: M×d features of running trials.
        groups: see `surrogate.Observations`.
    """

    points: np.ndarray
    objectives: np.ndarray
    variances: np.ndarray
    constraints: np.ndarray
    pending: np.ndarray
    groups: np.ndarray | None = None

    @property
    def feasible(self) -> np.ndarray:
        """Return which points (N bool) keep all constraints."""
        return np.asarray((self.constraints <= 0).all(1))

    @property
    def front(self) -> np.ndarray:
        """Return the indices of the front of the feasible points."""
        return front(self.objectives, self.feasible)


def propose_several(
    data: Results, candidates: np.ndarray, free: np.ndarray, snap: Snap, seed: int, num: int
) -> list[Proposal]:
    """Return the `num` best points, best first, by noisy expected hypervolume improvement over the front.

    Daulton et al. 2021 (arXiv 2105.08195), with one objective noisy expected improvement, both in the logarithmic form
    of Ament et al. 2023 (arXiv 2310.20708), with one Gaussian process for each objective and constraint
    (`surrogate.fit`). The reference point lies below the worst of the observed front by a tenth of its range (Ishibuchi
    et al. 2011). The best candidates are moved uphill along their
    free columns, rounded by `snap`, and compared again, as `surrogate.propose` does it.

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
    rows, index = np.concatenate([candidates, snapped]), np.concatenate([np.arange(len(candidates)), best])
    order = np.argsort(-values, kind="stable")[:num]
    return [Proposal(index=int(index[i]), features=rows[i]) for i in order]


def _thinned(data: Results) -> Results:
    """Return at most `MAX_POINTS` points, the front and the latest ones; a fit takes cubic time."""
    n = len(data.points)
    if n <= MAX_POINTS:
        return data
    chosen = set(data.front.tolist()[:MAX_POINTS])
    latest = [i for i in range(n - 1, -1, -1) if i not in chosen][: MAX_POINTS - len(chosen)]
    keep = sorted([*chosen, *latest])
    return Results(
        points=data.points[keep],
        objectives=data.objectives[keep],
        variances=data.variances[keep],
        constraints=data.constraints[keep],
        pending=data.pending,
        groups=data.groups,
    )


def _standardised(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the spread of each column, as `surrogate.fit` takes them; 1 for one that is constant."""
    spreads = columns.std(0, ddof=1) if len(columns) > 1 else np.zeros(columns.shape[1])
    return columns.mean(0), np.where(spreads > 0, spreads, 1.0)


def _acquisition(data: Results, seed: int) -> Gain:
    m = data.objectives.shape[1]
    columns = np.hstack([data.objectives, data.constraints])
    if not np.isfinite(columns).all():
        raise FitError("objectives and constraints must be finite")
    variances = np.hstack([data.variances, np.zeros_like(data.constraints)])
    models = [
        fit(Observations(points=data.points, scores=column, variances=noise, pending=data.pending, groups=data.groups))
        for column, noise in zip(columns.T, variances.T, strict=True)
    ]
    means, spreads = _standardised(columns)
    thresholds = (-means / spreads)[m:].tolist()
    known: dict[str, Any] = {
        "model": ModelListGP(*models),
        "X_baseline": torch.as_tensor(data.points, dtype=torch.float64),
        "sampler": SobolQMCNormalSampler(torch.Size([_DRAWS.get(m, _LEAST_DRAWS)]), seed=seed % 2**31),
        "constraints": [_bound(m + j, limit) for j, limit in enumerate(thresholds)] or None,
        "X_pending": torch.as_tensor(data.pending, dtype=torch.float64) if len(data.pending) else None,
        "prune_baseline": True,
    }
    if m == 1:
        first = torch.eye(columns.shape[1], dtype=torch.float64)[0]
        return qLogNoisyExpectedImprovement(objective=LinearMCObjective(first), **known)
    return qLogNoisyExpectedHypervolumeImprovement(
        ref_point=_reference((data.objectives - means[:m]) / spreads[:m], data.feasible),
        objective=IdentityMCMultiOutputObjective(outcomes=list(range(m))),
        **known,
    )


def _bound(column: int, limit: float) -> Callable[[Tensor], Tensor]:
    return lambda outcomes: outcomes[..., column] - limit


def _reference(objectives: np.ndarray, feasible: np.ndarray) -> Tensor:
    """Return the reference point (m) of standardised objectives; of all points while none is feasible."""
    known = objectives[front(objectives, feasible if feasible.any() else None)]
    point: Tensor = infer_reference_point(torch.as_tensor(known, dtype=torch.float64))
    # a front that is a point, or flat in one objective, has no range to take a tenth of
    return torch.minimum(point, torch.as_tensor(known.min(0) - _LEAST_ROOM, dtype=torch.float64))


def _evaluated(gain: Gain, points: np.ndarray) -> np.ndarray:
    """Return the acquisition value (Q) of each of Q×d points."""
    x = torch.as_tensor(points, dtype=torch.float64).unsqueeze(-2)
    with torch.no_grad():
        return torch.cat([gain(part) for part in torch.split(x, 64)]).numpy()


def _ascended(gain: Gain, starts: np.ndarray, free: np.ndarray) -> np.ndarray:
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


class View(Protocol):
    """How points are seen: their encoding, which of their parameters count, and what makes two equal."""

    @property
    def encoding(self) -> Encoding:
        """How points are numbers."""
        ...

    @property
    def active(self) -> Callable[[Params], Collection[str]]:
        """Which parameters count at a point."""
        ...

    @property
    def key(self) -> Callable[[Params], str]:
        """What two points share exactly if they are the same trial."""
        ...


@value
class Told:
    """What a sampler knows of a study: points as parameters, the rest as in `Results`, and the keys of all points."""

    points: tuple[Params, ...]
    objectives: np.ndarray
    variances: np.ndarray
    constraints: np.ndarray
    pending: tuple[Params, ...]
    known: frozenset[str]


def next_point(view: View, told: Told, make: Callable[[list[Params]], list[Params]], seed: int) -> Params:
    """Return the parameters of the next trial: the best of the candidates that is no trial yet.

    Args:
        view: of the space.
        told: what is known.
        make: points of the front -> candidates.
        seed: of every random draw.

    Raises:
        FitError: a numerical failure.
    """

    def features(params: Params) -> np.ndarray:
        return view.encoding.features(params, view.active(params))

    def moved(index: int, row: np.ndarray) -> Params:
        return view.encoding.moved(candidates[index], view.active(candidates[index]), row)

    data = Results(
        points=np.array([features(params) for params in told.points]),
        objectives=told.objectives,
        variances=told.variances,
        constraints=told.constraints,
        pending=np.array([features(params) for params in told.pending]),
        groups=view.encoding.groups,
    )
    candidates = make([told.points[i] for i in parents(data, NUM_PARENTS)])
    free = np.array([view.encoding.free(view.active(params)) for params in candidates])
    rows = np.array([features(params) for params in candidates])
    ranked = propose_several(data, rows, free, lambda i, row: features(moved(i, row)), seed, len(rows))
    for proposal in ranked:
        params = moved(proposal.index, proposal.features)
        if view.key(params) not in told.known:
            return params
    return moved(ranked[0].index, ranked[0].features)


def parents(data: Results, num: int) -> list[int]:
    """Return the indices of the points whose neighbours are candidates: the front, spread by volume.

    While nothing is feasible, the points that are least so; with one objective the best ones.
    """
    if not data.feasible.any():
        beyond = np.maximum(data.constraints, 0.0).sum(1)
        return [int(i) for i in np.argsort(beyond, kind="stable")[:num]]
    if data.objectives.shape[1] == 1:
        kept = np.flatnonzero(data.feasible)
        return [int(kept[i]) for i in np.argsort(-data.objectives[kept, 0], kind="stable")[:num]]
    members = data.front
    ends: Sequence[int] = [int(i) for i in np.argmax(data.objectives[members], axis=0)]
    return [int(members[i]) for i in spread(normalised(data.objectives[members]), ends, num)]
