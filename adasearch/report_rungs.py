"""What the rungs of a run's trials cost, and how well each of them ranks the trials as their final score does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adasearch.config import TrialResult
from adasearch.racing import Rung

FEW_TRIALS = 8
"""Fewer trials than this say nothing about how well a rung ranks them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RungRow:
    """What a rung costs and is worth, over the trials that it can be judged by.

    Args:
        label: its name.
        trials: how many they are: for a rung before the recovery all with a score, else those scored in full.
        seconds: mean time that it takes.
        share: of the mean time of a whole trial.
        correlation: Spearman's, with the final search score: 1 if the rung ranks trials as that does; None for fewer
            than `FEW_TRIALS` trials, or where all are equal.
    """

    label: str
    trials: int
    seconds: float
    share: float
    correlation: float | None


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis: Pearson's of the ranks, equal values sharing theirs.

    Args:
        a: ... x n.
        b: ... x n.

    Returns:
        One figure for each line, nan where one of the two is constant.
    """
    from scipy.stats import rankdata  # here, because it takes a quarter of a second to load

    x, y = (rankdata(values, axis=-1) for values in (a, b))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    found: np.ndarray = np.divide((x * y).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)
    return found


def _judged(results: Sequence[TrialResult]) -> dict[str, list[tuple[Rung, TrialResult]]]:
    """Return by label the rungs that can be held against a final score, but for that score itself."""
    found: dict[str, list[tuple[Rung, TrialResult]]] = {}
    for result in results:
        for rung in result.rungs:
            # the score of a trial that stopped is its last rung in other words
            if rung.kind != "recovered" or (rung.share < 1 and not result.stopped):
                found.setdefault(rung.label, []).append((rung, result))
    return found


def _correlation(pairs: Sequence[tuple[Rung, TrialResult]]) -> float | None:
    if len(pairs) < FEW_TRIALS:
        return None
    merits, scores = np.array([rung.merit for rung, _ in pairs]), np.array([result.score for _, result in pairs])
    found = float(spearman(merits, scores))
    return None if math.isnan(found) else found


def rung_rows(results: Sequence[TrialResult]) -> list[RungRow]:
    """Return one row for each rung of a study's trials, in the order of a trial."""
    whole = sum(sum(result.seconds.values()) for result in results) / max(1, len(results)) or 1.0
    rows = []
    for label, pairs in sorted(_judged(results).items(), key=lambda item: item[1][0][0].step):
        seconds = float(np.mean([rung.seconds for rung, _ in pairs]))
        correlation = _correlation(pairs)
        rows.append(
            RungRow(label=label, trials=len(pairs), seconds=seconds, share=seconds / whole, correlation=correlation)
        )
    return rows


def control_group(results: Sequence[TrialResult]) -> tuple[int, int]:
    """Return how many trials were behind at a rung yet scored in full, and how many of them ended ahead of their rival.

    They are the control group of racing; the share of them that ended ahead is what stopping costs.
    """
    whole = [result.rungs for result in results if not result.stopped]
    spared = [rungs[-1] for rungs in whole if any(rung.behind and rung.share < 1 for rung in rungs)]
    return len(spared), sum(rung.gap is not None and rung.gap > 0 for rung in spared)
