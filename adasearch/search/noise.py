"""How far the scores of trials are uncertain against each other, given that all are scored on the same items. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from adasearch.racing import TaskValues, comparable, paired_gap


class Consensus:
    """Mean value of every item over the trials that were scored in full.

    A score is the mean over items of v_ik = f_i + c_k + e_ik: what trial i is worth, what item k is worth to all, and
    the rest. The mean of c_k is the same in every trial's score and moves no comparison; what does is the mean of e_ik.
    Its standard error is estimated from the differences to the consensus, in the way of a two-way analysis of variance
    without replication (Scheffé 1959, chapter 4): sqrt(sum over T tasks of s^2 / n) / T, with s^2 the variance over n
    items of v_ik minus the consensus. The consensus over m other trials has a share 1 / m of the variance of a single
    one, which is taken off.
    """

    def __init__(self) -> None:
        self._sums: TaskValues = {}
        self._count = 0

    def add(self, values: TaskValues) -> None:
        """Count a trial in; one that was scored on fewer items than those before is left out."""
        if self._count and not comparable(values, {task: len(x) for task, x in self._sums.items()}):
            return
        self._sums = {task: self._sums.get(task, 0.0) + np.asarray(x, dtype=np.float64) for task, x in values.items()}
        self._count += 1

    def error(self, values: TaskValues, *, counted: bool = False) -> float | None:
        """Return the paired standard error of a trial, None where nothing is comparable.

        Args:
            values: of its items by task.
            counted: the trial is among those counted in, so that the consensus holds a share of it.
        """
        if counted and self._count < 2:
            return None
        lengths = {task: len(x) for task, x in values.items()}
        known = all(task in self._sums and len(self._sums[task]) >= n for task, n in lengths.items())
        if not self._count or not values or not known or min(lengths.values()) < 2:
            return None
        mean = {task: self._sums[task] / self._count for task in values}
        return paired_gap(values, mean)[1] * math.sqrt(self._count / (self._count + (-1 if counted else 1)))


def excess(variances: np.ndarray) -> np.ndarray:
    """Return by how much each of N noise variances is above the least.

    All trials of a search are scored on the same items: what is common to their noise moves no comparison.
    """
    return np.asarray(variances - variances.min())


def paired_variances(errors: np.ndarray) -> np.ndarray:
    """Return the squares of paired standard errors (N).

    A trial that has none, nan, takes the median: the first one told has no other to be paired with.
    """
    known = np.isfinite(errors)
    filled: np.ndarray = np.where(known, errors, np.median(errors[known]) if known.any() else 0.0)
    return np.asarray(filled * filled)


def score_variances(paired: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Return the noise variances of N scores: what moves one against the others.

    Those of `paired_variances` if any trial has a paired standard error. Else most of a plain standard error is common
    to all, and its `excess` counts.

    Args:
        paired: N paired standard errors, nan where there is none.
        plain: N plain ones, nan where there is none, which counts as 0.
    """
    if np.isfinite(paired).any():
        return paired_variances(paired)
    return excess(np.square(np.nan_to_num(plain, nan=0.0)))


def paired_errors(full: Mapping[int, TaskValues], stopped: Mapping[int, TaskValues]) -> dict[int, float]:
    """Return the paired standard errors of trials by number, of those that have one.

    Args:
        full: item values of the trials that were scored in full.
        stopped: of those that were scored on fewer items.
    """
    consensus = Consensus()
    for values in full.values():
        consensus.add(values)
    found = {number: consensus.error(values, counted=True) for number, values in full.items()}
    found |= {number: consensus.error(values) for number, values in stopped.items()}
    return {number: error for number, error in found.items() if error is not None}
