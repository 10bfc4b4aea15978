"""The gates of `adasearch.promotion` as a policy of a replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adasearch.promotion import ORDER, Gate, Told, gates
from adasearch.racing import FidelityConfig, in_control
from benchmarks.simulation import Progress, Stop


class Gates:
    """Stops a trial at a gate, but for a share that is drawn by its number, as a search does.

    Args:
        rules: which gates there are; the default's rungs are the divergence after the cut and the one midway.
        control: share of the trials that no gate stops.
    """

    def __init__(self, rules: FidelityConfig | None = None, control: float = 0.1) -> None:
        self._rules = rules or FidelityConfig(stop="value", midway=1 / 3)
        self._control = control
        wanted = {"divergence": self._rules.divergence, "unrecovered": self._rules.unrecovered,
                  "midway": self._rules.midway}  # fmt: skip
        self.extra = frozenset(kind for kind in ORDER if wanted[kind])
        self._known: tuple[int, int, tuple[Gate, ...]] = (-1, -1, ())

    def __call__(self, history: Sequence[Progress], progress: Progress, rung: str) -> Stop | None:
        """Return the end of a trial whose merit at `rung` is below the gate's, with the score that it predicts."""
        if in_control(self._control, 0, progress.number):
            return None
        number, count, known = self._known
        if (number, count) != (progress.number, len(history)):
            known = gates([_told(other, self.extra) for other in history], self._rules)
            self._known = progress.number, len(history), known
        for gate in known:
            if gate.kind == rung and progress.merits[rung] < gate.least:
                value, stderr = gate.predict(progress.merits[rung])
                return Stop(value=value, stderr=stderr)
        return None


def _told(progress: Progress, kinds: frozenset[str]) -> Told:
    """Return a trial as `gates` reads it; the score of one that was stopped counts for nothing there."""
    merits: dict[Any, float] = {kind: merit for kind, merit in progress.merits.items() if kind in kinds}
    whole = progress.score is not None
    left: dict[Any, float] = {kind: 1 - progress.reached[kind] / progress.spent for kind in merits} if whole else {}
    return Told(score=progress.score or 0.0, measured=whole, full=whole, merits=merits, left=left)
