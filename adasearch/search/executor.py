"""Where trials run: the protocol that the driver speaks, and its simplest speaker, this process."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, Self

from adasearch.documents import value
from adasearch.errors import AdaSearchError, TrialError
from adasearch.records import Failure

Worker = Callable[[Any], Any]
WorkerFactory = Callable[[], Worker]

_MAX_MESSAGE = 500
_OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "not enough memory")


@value
class Outcome:
    """What came of the task submitted as `key`: a value, or the reason why there is none."""

    key: str
    value: Any | None
    failure: Failure | None


class Executor(Protocol):
    """Runs tasks, `capacity` of them at the same time, each in a worker made by a `WorkerFactory`."""

    @property
    def capacity(self) -> int:
        """Tasks that can run at the same time."""
        ...

    def submit(self, key: str, task: Any, *, seconds: float) -> None:
        """Queue a task under a key; `seconds` bound the time that it may take."""
        ...

    def wait(self, timeout: float) -> list[Outcome]:
        """Return what has finished, waiting at most about `timeout` seconds for something to finish.

        Raises:
            AdaSearchError: what a worker raised that no other trial would fare better with.
        """
        ...

    def close(self) -> None:
        """End all workers, whatever they are doing; may be called twice."""
        ...

    def __enter__(self) -> Self:
        """Return itself."""
        ...

    def __exit__(self, *_: object) -> None:
        """Close it."""
        ...


def classify(error: BaseException) -> Failure:
    """Return the reason that an exception of a worker gives for a trial to have failed.

    Raises:
        AdaSearchError: `error` itself, if it is one that concerns every trial and must stop the search.
    """
    if isinstance(error, TrialError):
        return Failure(kind=error.kind, message=printable(error.message), phase=error.phase)
    if isinstance(error, AdaSearchError):
        raise error
    last = "".join(traceback.format_exception_only(error)).strip().splitlines()
    message = printable(last[-1] if last else type(error).__name__)
    if isinstance(error, MemoryError) or any(sign in message for sign in _OUT_OF_MEMORY):
        return Failure(kind="memory", message=message)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return Failure(kind="error", message=message + where)


def printable(text: str) -> str:
    """Return `text` on one line, without control characters and at most 500 characters long."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(line.split())
    return line if len(line) <= _MAX_MESSAGE else f"{line[: _MAX_MESSAGE - 3]}..."


class InProcessExecutor:
    """Runs one task at a time in this process, during `wait`. It cannot end a task that takes too long.

    Args:
        factory: called once, before the first task.
    """

    capacity = 1

    def __init__(self, factory: WorkerFactory) -> None:
        self._factory = factory
        self._worker: Worker | None = None
        self._queue: deque[tuple[str, Any]] = deque()

    def __enter__(self) -> InProcessExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, key: str, task: Any, *, seconds: float) -> None:
        """Queue a task; `seconds` has no effect."""
        del seconds
        self._queue.append((key, task))

    def wait(self, timeout: float) -> list[Outcome]:
        """Run the next task, if there is one, to its end."""
        del timeout
        if not self._queue:
            return []
        key, task = self._queue.popleft()
        try:
            if self._worker is None:
                self._worker = self._factory()
            return [Outcome(key=key, value=self._worker(task), failure=None)]
        except Exception as error:  # noqa: BLE001 - whatever a trial raises is the outcome of that trial
            return [Outcome(key=key, value=None, failure=classify(error))]

    def close(self) -> None:
        """Forget the worker and what is queued."""
        self._queue.clear()
        self._worker = None
