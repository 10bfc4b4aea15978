"""How far a trial is known on its way (rungs), and when it is stopped because it is behind. Pure.

Items are raced in pairs: a trial and its rival, the best trial told, are scored on the same items in the same order.
That order is drawn by the study's seed, task by task, and a block takes the same share of every task, so that every
beginning is a stratified sample of the whole. Letters: T tasks, n items of a task so far, N in all.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
import pydantic

from adasearch.documents import Finite, Fraction, Index, NonNegative, Positive, Share, value

TaskValues = dict[str, np.ndarray]
"""Value of each item by task (n-vectors), higher is better."""


@value
class FidelityConfig:
    """What is measured of a trial before it is scored, at low cost, and whether a trial stops by it.

    Measuring changes no score. The arithmetic of stopping is `adasearch.promotion`.

    Args:
        divergence: tokens on which the cut model is compared with the dense one, 0 for none. They come from all corpora
            that trials may calibrate on, from the part that search items come from: no trial is calibrated or recovered
            on them, and no report item or perplexity reads them.
        unrecovered: share of the search items that are scored before the recovery too, 0 for none.
        midway: share of the recovery after which the divergence is measured once more; 0, 1, or a `divergence` of 0,
            for never. A recovery of a single step has no such place.
        stop: by what a trial stops at one of these rungs. ``value``: what is left of it promises less for its cost than
            a new trial does; ``halving``: it is not among the best 1 / `eta` that reached the rung; ``none``: it goes
            on.
        threshold: under ``value``, how many times as much as a new trial the rest must promise for its cost. Below 1,
            because a trial that is scored in full also tells the optimizer more.
        eta: under ``halving``, one trial in so many goes on.
    """

    divergence: Index = 1024
    unrecovered: Share = 0.0
    midway: Share = 0.33
    stop: Literal["none", "value", "halving"] = "value"
    threshold: Positive = 0.5
    eta: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)] = 3.0


@value
class RacingConfig:
    """When a trial stops while it is scored: after each of `rungs` (fractions of its items), if it is surely behind.

    Args:
        enabled: false scores every item of every trial that is scored; `FidelityConfig.stop` is about those before.
        rungs: after which fractions of the items it is looked.
        z: confidence of a single look in standard errors; it is corrected for the number of looks, see `upper_bound`.
        grace: the first trials, this many, never race and are stopped at no rung.
        control: share of the trials, drawn by their number, that race and are looked at but never stopped, at no rung:
            they show what stopping costs.
    """

    enabled: bool = True
    rungs: tuple[Fraction, ...] = (0.3, 0.6)
    z: Positive = 2.0
    grace: Index = 4
    control: Share = 0.1


Early = Literal["divergence", "unrecovered", "midway"]
"""Rungs before the end of the recovery, in the order of a trial."""


@value
class Rung:
    """What was known of a trial at one point on its way.

    Args:
        kind: ``divergence``: mean KL(dense || cut) in nats per token right after the cut, lower is better;
            ``unrecovered``: the objective on search items before the recovery; ``midway``: the divergence after a part
            of the recovery; ``recovered``: the objective after it.
        share: of the search items that were scored, 0 for a divergence.
        value: the figure.
        stderr: its standard error, over windows of text or over items.
        seconds: that measuring it took, beyond the rung before.
        spent: seconds of the whole trial until it was known.
        gap: mean paired difference to the rival on the same items, None where there was no race.
        bound: upper confidence bound of the gap.
        least: merit below which a trial was to stop here, None where nothing was asked of it.
    """

    kind: Literal["divergence", "unrecovered", "midway", "recovered"]
    share: Share
    value: Finite
    stderr: NonNegative
    seconds: NonNegative
    spent: NonNegative = 0.0
    gap: Finite | None = None
    bound: Finite | None = None
    least: Finite | None = None

    @property
    def behind(self) -> bool:
        """Return whether a trial stops here, unless it is of the control group."""
        return (self.bound is not None and self.bound < 0) or (self.least is not None and self.merit < self.least)

    @property
    def merit(self) -> float:
        """Return the value with the sign that makes higher better."""
        return -self.value if self.kind in {"divergence", "midway"} else self.value

    @property
    def step(self) -> int:
        """Return its place among the rungs of a trial: 0, 1, 2, then percent of the items after the recovery."""
        return {"divergence": 0, "unrecovered": 1, "midway": 2}.get(self.kind, max(3, round(100 * self.share)))

    @property
    def label(self) -> str:
        """Return its name for a reader."""
        if self.kind == "midway":
            return "divergence midway through the recovery"
        return self.kind if self.kind == "divergence" else f"{self.kind}, {100 * self.share:.0f} % of items"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Race:
    """A rival's item values, and whether a trial that is behind stops."""

    rival: TaskValues
    stops: bool = True


def in_control(share: float, seed: int, number: int) -> bool:
    """Return whether a trial is of the control group, a draw that depends on the study's seed and its number alone."""
    digest = hashlib.sha256(f"{seed}/{number}/control".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def comparable(rival: TaskValues, counts: Mapping[str, int]) -> bool:
    """Return whether `rival` holds every item of every task, so that a race against it is fair."""
    return all(task in rival and len(rival[task]) == n for task, n in counts.items())


def _variance(values: np.ndarray) -> float:
    """Return the sample variance of a vector, 0 for a single value."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0


def paired_gap(values: TaskValues, rival: TaskValues) -> tuple[float, float, float]:
    """Return the mean difference to `rival`, its standard error and its degrees of freedom.

    Items are paired and tasks weigh the same: mean of T task means, error sqrt(sum of v) / T with v = s^2 / n of each
    task. The degrees of freedom are those of Welch (1947) and Satterthwaite (1946), (sum v)^2 / sum(v^2 / (n - 1)).

    Args:
        values: item values by task (n-vectors).
        rival: the same of another model, at least as many items of each task, in the same order.
    """
    gaps = [mine - rival[task][: len(mine)] for task, mine in values.items()]
    parts = [_variance(gap) / len(gap) for gap in gaps]
    spread = sum(part**2 / max(1, len(gap) - 1) for part, gap in zip(parts, gaps, strict=True))
    freedom = sum(parts) ** 2 / spread if spread > 0 else math.inf
    return float(np.mean([gap.mean() for gap in gaps])), math.sqrt(sum(parts)) / len(gaps), freedom


def upper_bound(values: TaskValues, rival: TaskValues, z: float, looks: int) -> tuple[float, float]:
    """Return the mean difference to `rival` and its upper confidence bound; below zero the model is behind.

    The bound is gap + q * error, with q the quantile of Student's t at 1 - (1 - Phi(z)) / looks: a look at z standard
    errors, corrected by Bonferroni for the number of looks and for the variance being that of few items.
    """
    from scipy.special import stdtrit  # here, so that reading a study does not load it

    gap, error, freedom = paired_gap(values, rival)
    level = 1.0 - NormalDist().cdf(-z) / max(1, looks)
    quantile = NormalDist().inv_cdf(level) if math.isinf(freedom) else float(stdtrit(freedom, level))
    return gap, gap + quantile * error


def estimate(values: TaskValues, rival: TaskValues) -> tuple[float, float]:
    """Return the score over all items of a model that was scored on the first of them, and its standard error.

    The score is the rival's over all items plus the paired gap over the first. With s_v^2 and s_d^2 the variances over
    items of the values and of the differences, its variance for one task is s_v^2 / N + s_d^2 (1 / n - 1 / N): that of
    a score over all items, plus what the missing ones leave open. (The variance of mean_N(rival) + mean_n(values -
    rival), rearranged.) At n = N it is that of a trial scored in full, so all trials stand on the same footing.

    Args:
        values: item values by task (n-vectors).
        rival: the same of another model over all N items.
    """
    scores, variances = [], []
    for task, mine in values.items():
        n, whole = len(mine), rival[task]
        gap = mine - whole[:n]
        scores.append(float(whole.mean() + gap.mean()))
        variances.append(_variance(mine) / len(whole) + _variance(gap) * (1 / n - 1 / len(whole)))
    return float(np.mean(scores)), math.sqrt(sum(variances)) / len(scores)
