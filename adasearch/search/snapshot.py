"""Where a search stands, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable

from adasearch.documents import value


@value
class Snapshot:
    """Where a search stands, for a display.

    Args:
        total: trials of the study, or those that there are once it was decided to ask for no more.
        done: trials that are finished, failed ones too; without the dense model.
        running: number, phase, and share of the phase done if known, of each trial in a worker.
        stopped: finished trials that stopped early.
        failed: finished trials that have no score.
        best: score of the best trial told, its standard error and number.
        dense: score of the dense model and its standard error.
        seconds_elapsed: since this driver started.
        seconds_left: estimate, None before the first trial is done.
        last: what has just happened, None if nothing has.
    """

    total: int
    done: int
    running: tuple[tuple[int, str, float | None], ...]
    stopped: int
    failed: int
    best: float | None
    best_stderr: float | None
    best_trial: int | None
    dense: float | None
    dense_stderr: float | None
    seconds_elapsed: float
    seconds_left: float | None
    last: str | None


Observer = Callable[[Snapshot], None]
