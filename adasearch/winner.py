"""Which finalist is the best: what the search believes of each, weighed with its score on fresh items. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adasearch.racing import TaskValues, paired_gap
from adasearch.records import Evidence

ACCURACY = "#acc"
"""Ending of the names under which the accuracies of report items lie among the items of a model."""

SELECT = "#select"
"""Ending of the names under which the values of select items lie among a finalist's items."""


def merits(known: Sequence[Evidence | None], items: Sequence[TaskValues]) -> list[float]:
    """Return what finalists are ranked by, higher is better, on the scale of their select scores.

    Finalist i has the posterior mean m_i with variance u_i from the search and the select score s_i, the mean over T
    tasks of the mean over items. Finalists are tuned for longer than trials and scored on other items, so only
    differences between them compare: the mean of s - m over finalists is added to every m. Both are weighed by the
    inverse of their variances, as two independent estimates of one number are best (Cochran 1937):

        merit_i = (v_i (m_i + mean(s - m)) + u_i s_i) / (u_i + v_i)

    Items are the same for all k finalists, and what makes an item hard for all of them says nothing of which is better.
    So v_i is that of the differences d_ij = x_ij - mean over finalists of x_ij, item by item: the sum over tasks of
    var_j(d_ij) / n, over T^2, times k / (k - 1), which the k-th part of x_i in its own mean takes away. The errors of
    the posterior means are correlated too, which u_i does not know: the fresh items weigh rather too much than too
    little. Finalists without posterior are ranked by s alone.

    Args:
        known: k pieces of evidence from the search.
        items: of each the values of its select items by task (n-vectors), the same tasks and items for all.

    Raises:
        ValueError: they were not scored on the same items.
    """
    k = len(items)
    if not k:
        return []
    sizes = [{task: len(values) for task, values in found.items()} for found in items]
    if any(size != sizes[0] for size in sizes) or not sizes[0]:
        raise ValueError(f"finalists must be scored on the same select items, given {sizes}")
    select = np.array([np.mean([values.mean() for values in found.values()]) for found in items])
    pairs = [(piece.mean, piece.sd) for piece in known if piece is not None]
    if k == 1 or len(pairs) < k or any(mean is None or sd is None for mean, sd in pairs):
        return [float(score) for score in select]
    mean, sd = np.array(pairs, dtype=float).T
    fresh, believed = _variances(items), np.square(sd)
    total = np.where(fresh + believed > 0, fresh + believed, 1.0)
    share = np.where(fresh + believed > 0, fresh / total, 0.0)
    return [float(merit) for merit in share * (mean + np.mean(select - mean)) + (1 - share) * select]


def _variances(items: Sequence[TaskValues]) -> np.ndarray:
    """Return v of `merits` for each of k finalists."""
    k = len(items)
    mean = {task: np.mean([found[task] for found in items], axis=0, dtype=float) for task in items[0]}
    return np.array([paired_gap(found, mean)[1] ** 2 * k / (k - 1) for found in items])
