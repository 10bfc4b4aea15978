"""Errors a user may meet. Each says what must hold, what was given and where; all of them survive pickling."""

from __future__ import annotations

from typing import ClassVar


class AdaSearchError(Exception):
    """Base of every error that adasearch raises on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class ConfigError(AdaSearchError):
    """A study, space, recipe or command line asks for something that cannot be.

    Args:
        where: file and key, such as ``study.yaml: budget.remove``.
        problem: what must hold and what was given.
    """

    exit_code = 2

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(where, problem)
        self.where = where
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}" if self.where else self.problem


class DataError(AdaSearchError):
    """A dataset, corpus or task cannot be read or does not hold what is needed."""

    exit_code = 3


class ModelError(AdaSearchError):
    """A model cannot be read, is of an unsupported family, or does not match its description."""

    exit_code = 3


class StorageError(AdaSearchError):
    """The run folder cannot be used: held by another driver, of another study, damaged, or the disk is full."""

    exit_code = 4


class NoTrialError(AdaSearchError):
    """No trial succeeded, or so many failed that going on would waste the budget."""

    exit_code = 5


class TrialError(AdaSearchError):
    """A trial cannot give a score.

    Args:
        kind: `nan`, `memory`, `timeout`, `worker_lost`, `error` or `config`.
        message: what happened, in a sentence.
        phase: step of the trial during which it happened, such as ``recover``.
    """

    def __init__(self, kind: str, message: str, phase: str = "") -> None:
        super().__init__(kind, message, phase)
        self.kind = kind
        self.message = message
        self.phase = phase

    def __str__(self) -> str:
        place = f" while in phase {self.phase}" if self.phase else ""
        return f"{self.kind}{place}: {self.message}"
