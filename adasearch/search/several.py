"""The next trial where several things count at once: by the volume that it is expected to add to the front.

With one objective under constraints it is the one of the greatest expected improvement that keeps them.

Shape legend: N observed points, M points running, Q candidates, d features in [0, 1], m objectives, c constraints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import LinearMCObjective
from botorch.models.model_list_gp_regression import ModelListGP
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from torch import Tensor

from adasearch.documents import value
from adasearch.pareto import front, normalised, spread
from adasearch.search.gaussian import FitError
from adasearch.search.ranking import Candidates, Proposal, ranked
from adasearch.search.surrogate import Observations, fit, standardised

MAX_POINTS = 300
_DRAWS = {1: 64, 2: 64, 3: 32}
_LEAST_DRAWS = 16
_LEAST_ROOM = 0.1

# BoTorch would compile a kernel of its own at the first proposal: a minute and more than a gigabyte on a small machine,
# and figures that depend on there being a compiler
logei._load_attempted = True

Gain = qLogNoisyExpectedImprovement | qLogNoisyExpectedHypervolumeImprovement


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


def propose_several(data: Results, candidates: Candidates, seed: int, num: int) -> list[Proposal]:
    """Return the `num` best points, best first, by noisy expected hypervolume improvement over the front.

    Daulton et al. 2021 (arXiv 2105.08195), with one objective noisy expected improvement, both in the logarithmic form
    of Ament et al. 2023 (arXiv 2310.20708), with one Gaussian process for each objective and constraint
    (`surrogate.fit`). The reference point lies below the worst of the observed front by a tenth of its range (Ishibuchi
    et al. 2011). See `ranking.ranked`.

    Args:
        data: what is known.
        candidates: where to look.
        seed: of every random draw.
        num: how many points to return.

    Raises:
        FitError: a numerical failure.
    """
    return ranked(lambda: _acquisition(_thinned(data), seed), candidates, seed, num)


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


def _acquisition(data: Results, seed: int) -> Gain:
    m = data.objectives.shape[1]
    columns = np.hstack([data.objectives, data.constraints])
    if not np.isfinite(columns).all():
        raise FitError("objectives and constraints must be finite")
    variances = np.hstack([data.variances, np.zeros_like(data.constraints)])
    each = [
        Observations(points=data.points, scores=column, variances=noise, pending=data.pending, groups=data.groups)
        for column, noise in zip(columns.T, variances.T, strict=True)
    ]
    standard = [standardised(column) for column in each]
    thresholds = [-found.center / found.spread for found in standard[m:]]
    known: dict[str, Any] = {
        "model": ModelListGP(*map(fit, each, standard)),
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
        ref_point=_reference(np.column_stack([found.scores for found in standard[:m]]), data.feasible),
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
