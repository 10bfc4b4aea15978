"""What the rungs of a run's trials cost and saved, and how well each ranks the trials as their final score does."""

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
        trials: how many they are: for a rung before the score all whose score was measured, else those scored in full.
        seconds: mean time that it takes.
        share: of the mean time of a whole trial.
        correlation: Spearman's, with the final search score: 1 if the rung ranks trials as that does; None for fewer
            than `FEW_TRIALS` trials, or where all are equal.
        stopped: trials that ended there.
        saved: seconds that this saved: of a trial scored in full on average, less what they took.
    """

    label: str
    trials: int
    seconds: float
    share: float
    correlation: float | None
    stopped: int
    saved: float


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


def _by_label(results: Sequence[TrialResult]) -> dict[str, list[tuple[Rung, TrialResult]]]:
    """Return by label the rungs of all trials, in the order of a trial, but for the final score itself."""
    pairs = [(rung, result) for result in results for rung in result.rungs]
    found: dict[str, list[tuple[Rung, TrialResult]]] = {}
    for rung, result in sorted(pairs, key=lambda pair: pair[0].step):
        if rung.kind != "recovered" or rung.share < 1:
            found.setdefault(rung.label, []).append((rung, result))
    return found


def _judges(rung: Rung, result: TrialResult) -> bool:
    """Return whether a rung can be held against the final score: that of a trial that stopped is its last rung."""
    return not result.stopped if rung.kind == "recovered" else result.measured


def _whole(results: Sequence[TrialResult]) -> float:
    """Return the mean seconds of trials."""
    return sum(sum(result.seconds.values()) for result in results) / max(1, len(results))


def _correlation(pairs: Sequence[tuple[Rung, TrialResult]]) -> float | None:
    if len(pairs) < FEW_TRIALS:
        return None
    merits, scores = np.array([rung.merit for rung, _ in pairs]), np.array([result.score for _, result in pairs])
    found = float(spearman(merits, scores))
    return None if math.isnan(found) else found


def rung_rows(results: Sequence[TrialResult]) -> list[RungRow]:
    """Return one row for each rung of a study's trials, in the order of a trial."""
    whole, full = _whole(results) or 1.0, _whole([result for result in results if not result.stopped])
    rows = []
    for label, pairs in _by_label(results).items():
        judged = [(rung, result) for rung, result in pairs if _judges(rung, result)]
        ended = [result for rung, result in pairs if result.stopped and rung is result.rungs[-1]]
        seconds = float(np.mean([rung.seconds for rung, _ in pairs]))
        rows.append(
            RungRow(
                label=label,
                trials=len(judged),
                seconds=seconds,
                share=seconds / whole,
                correlation=_correlation(judged),
                stopped=len(ended),
                saved=max(0.0, full - _whole(ended)) * len(ended),
            )
        )
    return rows


def control_group(results: Sequence[TrialResult]) -> tuple[int, int]:
    """Return how many trials were behind at a rung yet scored in full, and how many ended ahead of the best before.

    They are the control group; the share of them that ended ahead is what stopping costs. The best before is the rival
    on the same items where there was a race, else the best score of the trials scored in full with lower numbers.

    Args:
        results: of a study's trials, by number.
    """
    spared = ahead = 0
    best = -math.inf
    for result in results:
        if result.stopped:
            continue
        if any(rung.behind for rung in result.rungs[:-1]):
            gap = result.rungs[-1].gap
            spared += 1
            ahead += (result.score - best if gap is None else gap) > 0
        best = max(best, result.score)
    return spared, ahead
