"""Between the driver and its workers at the end of a run: models that several workers train together, and progress."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.display import duration
from adasearch.search.executor import Executor, Outcome

if TYPE_CHECKING:
    from adasearch.finalists import FinalTask

PERIOD = 1.0
"""Seconds between two looks at what the workers say of themselves."""


@dataclasses.dataclass(slots=True)
class _Team:
    """A task that is under way: what came of each of its processes so far."""

    size: int
    meeting: Path
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)


class Teams:
    """Runs models to be made, each by as many workers as it asks for and there are, which begin at the same time.

    Args:
        executor: of the workers.
        run: run folder, in which the workers of a team meet.
    """

    def __init__(self, executor: Executor, run: Path) -> None:
        self._executor, self._run = executor, run
        self._waiting: deque[tuple[FinalTask, float]] = deque()
        self._teams: dict[str, _Team] = {}

    def submit(self, task: FinalTask, *, seconds: float) -> None:
        """Queue a task; `seconds` bound the time that it may take."""
        self._waiting.append((task, seconds))

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has been finished, by the name of the task; see `Executor.wait`."""
        self._begin()
        done = []
        for outcome in self._executor.wait(timeout):
            name = outcome.key.rpartition("/")[0]
            team = self._teams[name]
            team.outcomes.append(outcome)
            if len(team.outcomes) == team.size:
                del self._teams[name]
                shutil.rmtree(team.meeting, ignore_errors=True)
                done.append(dataclasses.replace(_speaker(team.outcomes), key=name))
        return done

    def _begin(self) -> None:
        """Give out the next tasks, each once there are workers for all of its processes."""
        while self._waiting:
            task, seconds = self._waiting[0]
            size = min(task.rules.processes, self._executor.capacity)
            busy = sum(team.size - len(team.outcomes) for team in self._teams.values())
            if self._teams and busy + size > self._executor.capacity:
                return
            self._waiting.popleft()
            meeting = self._run / "final" / task.name / f"meeting-{uuid.uuid4().hex[:8]}"
            self._teams[task.name] = _Team(size, meeting)
            rules = dataclasses.replace(task.rules, processes=size)
            for rank in range(size):
                part = dataclasses.replace(task, rules=rules, rank=rank, meeting=str(meeting) if size > 1 else None)
                self._executor.submit(f"{task.name}/{rank}", part, seconds=seconds)


def _speaker(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome that counts: of a worker that was lost, of another failure, of the first process."""

    def order(outcome: Outcome) -> tuple[bool, bool, int]:
        failure = outcome.failure
        return failure is None or failure.kind != "worker_lost", failure is None, int(outcome.key.rpartition("/")[2])

    return min(outcomes, key=order)


@contextlib.contextmanager
def followed(run: Path, names: Iterable[str], show: Callable[[str], None], period: float = PERIOD) -> Iterator[None]:
    """Call `show` with what the models `names` are doing, every `period` seconds while there is anything to say.

    In a thread of its own, because an executor in this process comes back only when a model is made.
    """
    files = {name: run / "final" / name / "state.json" for name in names}
    before = {name: _state(path) for name, path in files.items()}  # of a driver that was killed
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(period):
            states = {name: _state(path) for name, path in files.items()}
            told = [state_line(name, s) for name, s in states.items() if s != before[name] and s.get("phase") != "done"]
            if told:
                show("; ".join(told))

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def state_line(name: str, state: dict[str, Any]) -> str:
    """Return what a model is doing in words, from its ``state.json``.

    >>> training = {"loss": 3.2, "tokens_per_second": 5310.0, "seconds_left": 250.0, "warning": ""}
    >>> state_line("trial7", {"phase": "recover", "progress": 0.4, "training": training})
    'trial7: recover 40%, loss 3.200, 5,310 tokens/s, about 4:10 left'
    """
    progress, training = state.get("progress"), state.get("training")
    line = f"{name}: {state.get('phase', 'starting')}" + (f" {progress:.0%}" if progress is not None else "")
    if training:
        line += f", loss {training['loss']:.3f}, {training['tokens_per_second']:,.0f} tokens/s"
        line += f", about {duration(training['seconds_left'])} left"
        line += f" (warning: {training['warning']})" if training["warning"] else ""
    return line
