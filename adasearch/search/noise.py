"""How far the scores of trials are uncertain against each other, given that all are scored on the same items. Pure."""

from __future__ import annotations

import math

import numpy as np

from adasearch.racing import TaskValues, comparable, paired_gap


class Consensus:
    """Mean value of every item over the trials that were scored in full.

    A score is the mean over items of v_ik = f_i + c_k + e_ik: what trial i is worth, what item k is worth to all, and
    the rest. The mean of c_k is the same in every trial's score and moves no comparison; what does is the mean of e_ik.
    Its standard error is estimated from the differences to the consensus, in the way of a two-way analysis of variance
    without replication (Scheffe 1959, chapter 4): sqrt(sum over T tasks of s^2 / n) / T, with s^2 the variance over n
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

    def error(self, values: TaskValues) -> float | None:
        """Return the paired standard error of a trial that is not counted in; None where nothing is comparable."""
        lengths = {task: len(x) for task, x in values.items()}
        known = all(task in self._sums and len(self._sums[task]) >= n for task, n in lengths.items())
        if not self._count or not values or not known or min(lengths.values()) < 2:
            return None
        mean = {task: self._sums[task] / self._count for task in values}
        return paired_gap(values, mean)[1] * math.sqrt(self._count / (self._count + 1))
