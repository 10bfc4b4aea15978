"""What is told of a trial: its values, its attributes, how far it is beyond limits, and its rungs."""

from __future__ import annotations

import warnings
from typing import Any

import optuna
from optuna.study import StudyDirection

from adasearch.config import TrialResult
from adasearch.documents import plain
from adasearch.records import Record
from adasearch.search.sampler import STDERR
from adasearch.sections import ObjectiveConfig

CONSTRAINTS = "constraints"


def directions(objective: ObjectiveConfig) -> list[StudyDirection]:
    """Return what Optuna is to do with each value: the score goes up, the costs beside it go down."""
    return [StudyDirection.MAXIMIZE, *(StudyDirection.MINIMIZE for _ in objective.also)]


def metric_names(objective: ObjectiveConfig) -> list[str]:
    """Return what each value is called."""
    return [f"{objective.metric}, mean of the search tasks", *map(_metric, objective.also)]


def _metric(cost: str) -> str:
    return f"{cost}, fraction of dense"


def values(objective: ObjectiveConfig, result: TrialResult) -> list[float]:
    """Return the values of a trial in the order of `directions`: its score, then costs as fractions of the dense."""
    return [result.score, *(result.shares[cost] for cost in objective.also)]


def attributes(record: Record) -> dict[str, Any]:
    """Return what the dashboard shows in columns; `STDERR` is also what the sampler takes the noise from."""
    if record.result is None:
        assert record.failure is not None
        return {"state": "failed", "attempt": record.attempt, "failure": plain(record.failure)}
    result = record.result
    early: dict[str, Any] = {rung.kind: rung.value for rung in result.rungs if rung.kind != "recovered"}
    return {
        **early,
        STDERR: result.stderr,
        **{f"{STDERR} {_metric(cost)}": spread for cost, spread in result.spreads.items()},
        **{_metric(cost): round(share, 5) for cost, share in result.shares.items()},
        "state": "stopped" if result.stopped else "done",
        "attempt": record.attempt,
        "parameters": result.parameters,
        "items": result.items,
        "seconds": round(sum(result.seconds.values()), 2),
        "tasks": {task.task: round(task.acc, 4) for task in result.tasks},
    }


def constrain(
    study: optuna.Study, frozen: optuna.trial.FrozenTrial, objective: ObjectiveConfig, record: Record
) -> None:
    """Tell how far a trial is beyond each hard limit, whatever came of it: a GP sampler fails where one is missing.

    Under the key of Optuna 4, a list, which the samplers of Optuna 5 and the dashboard both read; the dashboard does
    not know the key that `Trial.set_constraint` writes.
    """
    found = objective.violations(record.result.shares if record.result else {})
    if found:
        study._storage.set_trial_system_attr(frozen._trial_id, CONSTRAINTS, list(found.values()))


def report_rungs(trial: optuna.Trial, record: Record) -> None:
    """Tell the rungs as intermediate values, higher is better: a divergence is told with the other sign.

    With several objectives Optuna takes no intermediate values; there they are an attribute.
    """
    rungs = record.result.rungs if record.result else ()
    if len(trial.study.directions) > 1:
        trial.set_user_attr("rungs", {str(rung.step): rung.merit for rung in rungs})
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that was killed while telling has told some of them
        for rung in rungs:
            trial.report(rung.merit, rung.step)
