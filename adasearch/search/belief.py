"""What is believed of trials once all of them are seen together: the surrogate's posterior in units of the score.

The best of many noisy scores is too high on average (the winner's curse); the posterior mean of a trial draws on its
neighbours and is not. It is also what an improvement is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from adasearch.documents import value
from adasearch.records import DENSE, Evidence, Record
from adasearch.search.space import Space

FEW_TRIALS = 5
"""Below so many scored trials there is nothing to model."""


@value
class Scored:
    """A trial with a score: its point, the score, its standard error (paired), and whether all items were scored."""

    params: dict[str, Any]
    score: float
    stderr: float
    full: bool


def posterior(
    space: Space, trials: Sequence[Scored], points: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the posterior mean and standard deviation of the true score at points of a space.

    Args:
        space: which they are points of.
        trials: N trials, those that were stopped early among them: theirs are scores with a larger error.
        points: Q points.

    Returns:
        two Q-vectors, in units of the score.

    Raises:
        FitError: a numerical failure.
    """
    from adasearch.search import surrogate  # here, because a worker imports `finalize` and has no use for the model

    data = surrogate.Observations(
        points=np.array([space.features(trial.params) for trial in trials]),
        scores=np.array([trial.score for trial in trials]),
        variances=np.array([trial.stderr**2 for trial in trials]),
        pending=np.array([]),
        groups=space.encoding.groups,
    )
    return surrogate.posterior(data, np.array([space.features(params) for params in points]))


def expected_improvement(mean: float, sd: float, best: float) -> float:
    """Return E[max(f - best, 0)] for f normal: (mean - best) Phi(z) + sd phi(z), z = (mean - best) / sd.

    Jones, Schonlau & Welch 1998, equation 15.
    """
    if sd <= 0:
        return max(mean - best, 0.0)
    z = (mean - best) / sd
    return (mean - best) * NormalDist().cdf(z) + sd * NormalDist().pdf(z)


def expected_gain(space: Space, trials: Sequence[Scored], params: dict[str, Any]) -> float | None:
    """Return the improvement to be expected of a point, in standard errors of the best trial's score.

    The best trial is the one of the highest posterior mean among those scored in full, and that mean is what is to be
    improved. None where it cannot be told: fewer than `FEW_TRIALS` trials, none in full, the best one without an error,
    or a model that fails.
    """
    from adasearch.search.surrogate import FitError

    full = [i for i, trial in enumerate(trials) if trial.full]
    if len(trials) < FEW_TRIALS or not full:
        return None
    try:
        mean, sd = posterior(space, trials, [*(trial.params for trial in trials), params])
    except FitError:
        return None
    best = max(full, key=lambda i: (mean[i], -i))
    error = trials[best].stderr
    if not (error > 0 and math.isfinite(error)):
        return None
    return expected_improvement(float(mean[-1]), float(sd[-1]), float(mean[best])) / error


def evidence(
    space: Space, records: Sequence[Record], paired: Mapping[int, float] | None = None
) -> tuple[dict[int, Evidence], str]:
    """Return what the search knows of each trial that has a score, by number, and why there is no posterior if so.

    Args:
        space: of the search.
        records: of its trials; those without a result and the dense model are passed over.
        paired: standard errors of the scores against each other, by number; where there is none the plain one counts.

    Returns:
        the evidence, without posterior where there are fewer than `FEW_TRIALS` trials, where one is no point of the
        space, and where the model fails; and the reason, empty where there is a posterior.
    """
    from adasearch.search.surrogate import FitError

    found = [(r, r.result) for r in records if r.number != DENSE and r.result is not None]
    observed = {r.number: Evidence(score=result.score, stderr=result.stderr) for r, result in found}
    if len(found) < FEW_TRIALS:
        return observed, f"{len(found)} trials are too few for a model"
    points = [space.encode(r.config or {}) for r, _ in found]
    trials = [
        Scored(
            params=params,
            score=result.score,
            stderr=(paired or {}).get(r.number, result.stderr),
            full=not result.stopped,
        )
        for (r, result), params in zip(found, points, strict=True)
        # a score that was taken from an equal trial is no second observation
        if params is not None and not result.twin
    ]
    known = [params for params in points if params is not None]
    if len(known) < len(found):
        lost = next(r.number for (r, _), params in zip(found, points, strict=True) if params is None)
        return observed, f"trial {lost} is no point of the space"
    try:
        mean, sd = posterior(space, trials, known)
    except FitError as error:
        return observed, f"the model failed ({error})"
    return {
        r.number: Evidence(score=result.score, stderr=result.stderr, mean=float(m), sd=float(s))
        for (r, result), m, s in zip(found, mean, sd, strict=True)
    }, ""
