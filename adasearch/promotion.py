"""Whether the rest of a trial is worth its cost, from what is known of it at a rung before its score. Pure.

A gate says which merit a trial must have at a rung to go on. It is computed when the trial is handed out, from the
trials told by then alone, so that no worker waits for a rung to fill and the same history gives the same gates.

The final score y is regressed on the transformed merit x of a rung, over all trials whose score was measured. (Trials
that a race stopped count as well: leaving them out would select on y and flatten the slope; those that a gate stopped
were selected on x, which does a regression no harm.) Letters: n trials of a regression, x their transformed merits,
y their scores, b the best score of a trial that was scored in full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adasearch.documents import Count, Finite, NonNegative, Positive, value
from adasearch.racing import Early, FidelityConfig

ORDER: tuple[Early, ...] = ("divergence", "unrecovered", "midway")
LEAST_TRIALS = 8
"""Fewer measured trials than this say nothing about what a rung is worth."""
RECENT = 20
"""So many of the last trials stand for what a new one would be: proposals get better as a search goes on."""

_CONFIDENCE = 0.975
_TINY = 1e-9
_HALVINGS = 60


@value
class Fit:
    """The posterior of a line y = intercept + slope (x - center) + noise, see `fitted`.

    Args:
        center: mean of x over the trials that it comes from.
        lowest: least x among them; below it nothing is known and it is taken for what is there.
        intercept: predicted score at the center.
        slope: of the predicted score in x.
        slope_stderr: standard error of the slope.
        scale: standard error of a predicted score at the center, over and above that of the slope.
        freedom: degrees of freedom, n - 2.
    """

    center: Finite
    lowest: Finite
    intercept: Finite
    slope: Finite
    slope_stderr: NonNegative
    scale: Positive
    freedom: Count

    def at(self, x: float) -> float:
        """Return the predicted score at x."""
        return self.intercept + self.slope * self._away(x)

    def error(self, x: float) -> float:
        """Return the standard error of the predicted score at x."""
        return math.hypot(self.scale, self.slope_stderr * self._away(x))

    def _away(self, x: float) -> float:
        return max(x, self.lowest) - self.center


@value
class Gate:
    """What a trial must show at a rung, and what is believed of its score there.

    Args:
        kind: of the rung.
        least: merit (`Rung.merit`) below which the trial stops.
        fit: of the score on the transformed merit.
        stops: false only records that the trial would have stopped: it is of the control group.
    """

    kind: Early
    least: Finite
    fit: Fit
    stops: bool = True

    def predict(self, merit: float) -> tuple[float, float]:
        """Return the final score that is to be expected of a trial, and the standard error of that prediction."""
        x = transformed(self.kind, merit)
        return self.fit.at(x), self.fit.error(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A trial of the history.

    Args:
        score: what was told of it.
        measured: the score comes from items scored after the recovery, and is no prediction of a gate.
        full: all items were scored.
        merits: by kind of rung, as far as it came.
        left: share of its seconds that were still to come at each of these rungs; read of trials scored in full.
    """

    score: float
    measured: bool
    full: bool
    merits: Mapping[Early, float]
    left: Mapping[Early, float]


def transformed(kind: Early, merit: float) -> float:
    """Return x: for a divergence d its -ln d, because d has a heavy tail and scores have none; else the merit itself.

    It rises with the merit. A divergence of nothing, or below it by rounding, counts as 1e-9.
    """
    return merit if kind == "unrecovered" else -math.log(max(-merit, _TINY))


def merit_of(kind: Early, x: float) -> float:
    """Return the merit whose transform is x."""
    return x if kind == "unrecovered" else -math.exp(-x)


def fitted(x: np.ndarray, y: np.ndarray) -> Fit | None:
    """Return the Bayesian linear regression of y on x under the prior 1 / sigma^2 (Gelman et al., BDA3, section 14.2).

    With S = sum (x - center)^2 and s^2 = RSS / (n - 2), a new y at x is Student t with n - 2 degrees of freedom, mean
    intercept + slope (x - center) and variance s^2 (1 + 1/n + (x - center)^2 / S): the last term is the slope's.

    Args:
        x: transformed merits, n.
        y: scores, n.

    Returns:
        the fit; None for fewer than `LEAST_TRIALS` trials and where all x are equal.
    """
    n = len(x)
    if n < LEAST_TRIALS or float(np.ptp(x)) <= _TINY:
        return None
    center, intercept = float(x.mean()), float(y.mean())
    spread = float(((x - center) ** 2).sum())
    slope = float(((x - center) * (y - intercept)).sum()) / spread
    residuals = y - intercept - slope * (x - center)
    deviation = max(math.sqrt(float((residuals**2).sum()) / (n - 2)), _TINY)
    return Fit(
        center=center,
        lowest=float(x.min()),
        intercept=intercept,
        slope=slope,
        slope_stderr=deviation / math.sqrt(spread),
        scale=deviation * math.sqrt(1 + 1 / n),
        freedom=n - 2,
    )


def rises(fit: Fit) -> bool:
    """Return whether the posterior probability of a positive slope is at least 0.975."""
    from scipy.special import stdtrit  # here, so that reading a study does not load it

    return fit.slope > float(stdtrit(fit.freedom, _CONFIDENCE)) * fit.slope_stderr


def expected_gain(mean: float, scale: float, freedom: int, best: float) -> float:
    """Return E[max(y - best, 0)] for y = mean + scale T, T of Student's t with `freedom` > 1 (Tracey & Wolpert 2018).

    With z = (mean - best) / scale, F and f distribution and density of T and v its freedom, it is
    (mean - best) F(z) + scale (v + z^2) / (v - 1) f(z): it rises with the mean, and is at least mean - best.
    """
    from scipy.special import stdtr

    z = (mean - best) / scale
    log_density = (
        math.lgamma((freedom + 1) / 2)
        - math.lgamma(freedom / 2)
        - 0.5 * math.log(freedom * math.pi)
        - (freedom + 1) / 2 * math.log1p(z * z / freedom)
    )
    tail = scale * (freedom + z * z) / (freedom - 1) * math.exp(log_density)
    return max((mean - best) * float(stdtr(freedom, z)) + tail, 0.0)


def gates(history: Sequence[Told], rules: FidelityConfig, *, stops: bool = True) -> tuple[Gate, ...]:
    """Return the gates of the next trial, in the order of a trial, one for each rung that is worth asking.

    ``value`` lets a trial go on where what it promises for the rest of its cost is at least `threshold` times what a
    new trial promises for all of its cost. Promise is the expected improvement over b. That of a new trial is the mean
    over the `RECENT` last trials of what each promised at the first rung, so both sides are read off the same line and
    rungs passed are no merit of their own. As promise rises with the merit, the rule is a least merit. There is no gate
    where the slope is not surely positive, nor where even the least merit seen is worth going on.

    ``halving`` is asynchronous successive halving in its stopping variant (Li et al., MLSys 2020): a trial goes on if
    it is among the best 1 / `eta`, at least one, of those that reached the rung, itself included.

    Args:
        history: trials told, by number.
        rules: of the study.
        stops: whether the trial stops, or is of the control group.
    """
    if rules.stop == "none":
        return ()
    known: dict[Early, Fit] = {}
    for kind in ORDER:
        rows = [(transformed(kind, t.merits[kind]), t.score) for t in history if t.measured and kind in t.merits]
        fit = fitted(*np.array(rows, dtype=float).reshape(-1, 2).T)
        if fit is not None:
            known[kind] = fit
    least = (_by_value if rules.stop == "value" else _by_rank)(history, rules, known)
    return tuple(Gate(kind=kind, least=merit, fit=known[kind], stops=stops) for kind, merit in least.items())


def _by_rank(history: Sequence[Told], rules: FidelityConfig, known: Mapping[Early, Fit]) -> dict[Early, float]:
    """Return the least merit of each rung under ``halving``."""
    found: dict[Early, float] = {}
    for kind in known:
        merits = sorted((t.merits[kind] for t in history if kind in t.merits), reverse=True)
        passing = max(1, math.floor((len(merits) + 1) / rules.eta))
        found[kind] = merits[passing - 1]
    return found


def _by_value(history: Sequence[Told], rules: FidelityConfig, known: Mapping[Early, Fit]) -> dict[Early, float]:
    """Return the least merit of each rung under ``value``."""
    full = [t for t in history if t.full]
    rising = {kind: fit for kind, fit in known.items() if rises(fit)}
    if not full or not rising:
        return {}
    best = max(t.score for t in full)
    first = next(iter(rising))
    recent = [transformed(first, t.merits[first]) for t in history if first in t.merits][-RECENT:]
    line = rising[first]
    promise = float(np.mean([expected_gain(line.at(x), line.scale, line.freedom, best) for x in recent]))
    found: dict[Early, float] = {}
    for kind, fit in rising.items():
        wanted = rules.threshold * _share_left(kind, full) * promise
        x = _least(fit, best, wanted)
        if x is not None:
            found[kind] = merit_of(kind, x)
    return found


def _share_left(kind: Early, full: Sequence[Told]) -> float:
    """Return the share of a trial's cost that is still to come at a rung.

    In tenths, so that two runs of one study, on clocks that are never quite the same, seldom decide otherwise.
    """
    shares = [t.left[kind] for t in full if kind in t.left]
    return max(0.1, round(float(np.mean(shares)), 1)) if shares else 1.0


def _least(fit: Fit, best: float, wanted: float) -> float | None:
    """Return the least x that promises `wanted`, by bisection; None where the lowest x of the fit does."""

    def promise(x: float) -> float:
        return expected_gain(fit.at(x), fit.scale, fit.freedom, best)

    low = fit.lowest
    if promise(low) >= wanted:
        return None
    high = fit.center + (best + wanted - fit.intercept) / fit.slope  # there the mean alone gains what is wanted
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if promise(middle) >= wanted else (middle, high)
    return high
