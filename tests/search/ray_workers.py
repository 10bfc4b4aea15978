"""Workers in plain Python for the tests of the Ray executor, in a module that worker processes can import."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adasearch.errors import ConfigError, DataError, StorageError, TrialError


class FakeOutOfMemoryError(RuntimeError):
    """Stands for torch's, which is told by its name."""


FakeOutOfMemoryError.__name__ = "OutOfMemoryError"

ERRORS: dict[str, Callable[[], BaseException]] = {
    "trial": lambda: TrialError("nan", "loss is nan", "recover"),
    "memory": lambda: MemoryError("no room"),
    "cuda": lambda: FakeOutOfMemoryError("CUDA out of memory"),
    "error": lambda: ZeroDivisionError("division by zero"),
    "config": lambda: ConfigError("study.yaml: budget.remove", "must be reachable"),
    "data": lambda: DataError("no such corpus"),
    "storage": lambda: StorageError("the disk is full"),
}


def fault(name: str) -> None:
    raise ERRORS[name]()


def kill(_: None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def hang(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def stop(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


def meet(folder: str) -> int:
    """Return once two workers have come to `folder`."""
    (Path(folder) / str(os.getpid())).touch()
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.02)
    return os.getpid()


TASKS: dict[str, Callable[[Any], Any]] = {
    "square": lambda number: number * number,
    "environment": lambda names: {name: os.environ.get(name) for name in names},
    "unpicklable": lambda _: threading.Lock(),
    "raise": fault,
    "kill": kill,
    "sleep": sleep,
    "hang": hang,
    "stop": stop,
    "meet": meet,
}


def work(task: tuple[str, Any]) -> Any:
    """Do the task that the first word names with the second."""
    name, argument = task
    return TASKS[name](argument)


def open_worker() -> Callable[[Any], Any]:
    return work


def open_counted(folder: str) -> Callable[[Any], Any]:
    """Leave a file in `folder` each time a worker is opened."""
    (Path(folder) / f"{os.getpid()}-{time.monotonic_ns()}").touch()
    return work


def refuse(folder: str) -> Callable[[Any], Any]:
    open_counted(folder)
    raise DataError("the corpus must hold 100 documents, given 3")


def fail() -> Callable[[Any], Any]:
    raise ValueError("cannot open")


def die(folder: str) -> Callable[[Any], Any]:
    open_counted(folder)
    os.kill(os.getpid(), signal.SIGKILL)
    return work
