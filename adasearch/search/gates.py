"""What a trial is asked at its rungs, from the records of those that were told when it was asked."""

from __future__ import annotations

from collections.abc import Sequence

from adasearch.config import StudyConfig
from adasearch.promotion import ORDER, Gate, Told, gates
from adasearch.records import DENSE, Record


def told_of(record: Record) -> Told | None:
    """Return what a trial adds to the history of rungs; None where it failed, or took the result of an equal one."""
    result = record.result
    if result is None or result.twin:
        return None
    rungs = {kind: rung for rung in result.rungs for kind in ORDER if rung.kind == kind}
    seconds = sum(result.seconds.values())
    return Told(
        score=result.score,
        measured=result.measured,
        full=not result.stopped,
        merits={kind: rung.merit for kind, rung in rungs.items()},
        left={kind: max(0.0, 1 - rung.spent / seconds) if seconds else 1.0 for kind, rung in rungs.items()},
    )


def gates_of(study: StudyConfig, number: int, told: Sequence[Record], *, control: bool) -> tuple[Gate, ...]:
    """Return the gates of a trial, none for the dense model and for the first `racing.grace` trials.

    With several objectives there are none: a model with a lower score may be the better one for its size.

    Args:
        study: with the rules.
        number: of the trial.
        told: what came of the trials that were told when this one was asked, by number. That is all the gates depend
            on, so a search that was interrupted, or whose trial is run again, asks the same.
        control: the trial is measured and never stopped.
    """
    if number == DENSE or number < study.racing.grace or study.objective.several:
        return ()
    history = [told_of(record) for record in told]
    return gates([trial for trial in history if trial is not None], study.fidelity, stops=not control)
