"""What is worth having when two things pull apart: fronts, their volume, and where they bend. Pure.

Shape letters: N points, m objectives, all maximised unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from adasearch.documents import value

Z = 1.96
"""Standard errors on either side of a 95 % interval."""


def front(values: np.ndarray, feasible: np.ndarray | None = None) -> np.ndarray:
    """Return the indices of the points that no other dominates, ascending; of equal points the first.

    A point dominates another that it is nowhere below and somewhere above.

    Args:
        values: N×m, higher is better.
        feasible: N bool; the others neither dominate nor are returned. None takes all.
    """
    allowed = np.ones(len(values), dtype=bool) if feasible is None else np.asarray(feasible, dtype=bool)
    found: list[int] = []
    for i in np.flatnonzero(allowed):
        others = values[allowed]
        dominated = ((others >= values[i]).all(1) & (others > values[i]).any(1)).any()
        if not dominated and not any(np.array_equal(values[i], values[j]) for j in found):
            found.append(int(i))
    return np.array(found, dtype=int)


def hypervolume(values: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume that points dominate above a reference point (Zitzler & Thiele 1998).

    By slices along the last objective: between two of its values the volume is that of the points above them in the
    other objectives (While et al. 2006), exact for any m, in time N^(m-1).

    Args:
        values: N×m, higher is better; what does not exceed the reference everywhere adds nothing.
        reference: m.
    """
    inside = values[(values > reference).all(1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(inside.max() - reference[0])
    inside = inside[np.argsort(-inside[:, -1], kind="stable")]
    ends = [*inside[1:, -1], reference[-1]]
    depths = inside[:, -1] - ends
    slabs = (hypervolume(inside[: i + 1, :-1], reference[:-1]) * depth for i, depth in enumerate(depths) if depth > 0)
    return float(sum(slabs))


def normalised(values: np.ndarray) -> np.ndarray:
    """Return values (N×m) with each objective's least at 0 and greatest at 1; one that is constant is 0."""
    low, high = values.min(0), values.max(0)
    return np.asarray((values - low) / np.where(high > low, high - low, 1.0))


def spread(values: np.ndarray, first: Sequence[int], num: int) -> list[int]:
    """Return `num` points that cover a front: `first`, then each time the one that adds most to the hypervolume.

    Args:
        values: N×m of the front, higher is better.
        first: indices that are taken first, in this order.
        num: how many; fewer where there are not so many.
    """
    scaled = normalised(values)
    reference = np.full(scaled.shape[1], -0.1)
    chosen = list(dict.fromkeys(first))[:num]
    while len(chosen) < min(num, len(values)):
        rest = [i for i in range(len(values)) if i not in chosen]
        volumes = [hypervolume(scaled[[*chosen, i]], reference) for i in rest]
        chosen.append(rest[int(np.argmax(volumes))])
    return chosen


@value
class Knee:
    """Where a front bends most.

    Args:
        index: of the point.
        gain: its score above the straight line between the ends of the front, at its cost.
        stderr: of the gain, as if the three scores were independent; on the same items it is less.
    """

    index: int
    gain: float
    stderr: float

    @property
    def clear(self) -> bool:
        """Return whether the bend is more than noise: the 95 % interval of the gain leaves out 0."""
        return self.gain > Z * self.stderr


def knee(scores: np.ndarray, stderrs: np.ndarray, costs: np.ndarray) -> Knee | None:
    """Return the knee of a front: the point farthest above the line between its ends, in normalised coordinates.

    (Das 1999, "On characterizing the knee of the Pareto curve"; the distance to a line and the height above it differ
    by a factor that is the same for all points, so the height, which is a score, is what is compared.)

    Args:
        scores: N, of the front, higher is better.
        stderrs: N, their standard errors.
        costs: N, lower is better.

    Returns:
        None where fewer than three points have different costs, or none lies above the line.
    """
    low, high = int(np.argmin(costs)), int(np.argmax(scores))
    if len(np.unique(costs)) < 3 or costs[low] >= costs[high]:
        return None
    part = (costs - costs[low]) / (costs[high] - costs[low])
    gains = scores - (1 - part) * scores[low] - part * scores[high]
    errors = np.sqrt(stderrs**2 + ((1 - part) * stderrs[low]) ** 2 + (part * stderrs[high]) ** 2)
    between = (part > 0) & (part < 1)
    best = int(np.argmax(np.where(between, gains, -np.inf)))
    if not between.any() or gains[best] <= 0:
        return None
    return Knee(index=best, gain=float(gains[best]), stderr=float(errors[best]))


@value
class Bargain:
    """The cheapest point that loses at most so much of a score.

    Args:
        index: of the point.
        allowed: loss that was allowed, a fraction (0.02 is two points).
        loss: its loss.
        stderr: of the loss, as if both scores were independent.
    """

    index: int
    allowed: float
    loss: float
    stderr: float

    @property
    def sure(self) -> bool:
        """Return whether all of the 95 % interval of the loss is allowed."""
        return self.loss + Z * self.stderr <= self.allowed


def bargain(
    scores: np.ndarray, stderrs: np.ndarray, costs: np.ndarray, reference: tuple[float, float], allowed: float
) -> Bargain | None:
    """Return the cheapest point whose score is at most `allowed` below a reference; None where there is none.

    Args:
        scores: N, higher is better.
        stderrs: N, their standard errors.
        costs: N, lower is better; of equal ones the higher score counts.
        reference: a score and its standard error.
        allowed: greatest loss.
    """
    score, error = reference
    kept = [i for i in range(len(scores)) if score - scores[i] <= allowed]
    if not kept:
        return None
    best = min(kept, key=lambda i: (costs[i], -scores[i], i))
    return Bargain(
        index=best, allowed=allowed, loss=float(score - scores[best]), stderr=math.hypot(error, stderrs[best])
    )
