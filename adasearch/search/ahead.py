"""The next proposal, computed beside the search, so that no free worker waits for it."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

from adasearch.search.outcomes import Proposed


class Proposer:
    """Computes one proposal at a time, in one thread of its own.

    While one is computed nothing is told (`outcomes.due`), so it sees all that its trial may know, and what it is does
    not depend on when it is ready.

    Args:
        compute: trials so far -> the next one; reads and writes nothing else.
        ahead: False computes in the caller's thread: where trials run in this process, they and the model would share
            the random state of the libraries.
    """

    def __init__(self, compute: Callable[[Any], Proposed], *, ahead: bool) -> None:
        self._compute = compute
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "proposer") if ahead else None
        self._future: concurrent.futures.Future[Proposed] | None = None

    def close(self) -> None:
        """Take no more work, and wait for the proposal under way: it draws from random states that others share."""
        self.forget()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Return whether a proposal was begun and not taken yet."""
        return self._future is not None

    def proposal(self, trials: Callable[[], Any]) -> Proposed | None:
        """Return the next proposal, or None if it is not ready; it is begun by the first call after the last was taken.

        What goes wrong in the thread is raised here.

        Args:
            trials: called where a proposal is begun, gives all trials so far.
        """
        if self._pool is None:
            return self._compute(trials())
        if self._future is None:
            self._future = self._pool.submit(self._compute, trials())
        if not self._future.done():
            return None
        future, self._future = self._future, None
        return future.result()

    def wait(self, timeout: float) -> None:
        """Return when the proposal under way is ready, after `timeout` seconds at the latest."""
        if self._future is not None:
            concurrent.futures.wait([self._future], timeout)

    def forget(self) -> None:
        """Leave the proposal under way to itself."""
        self._future = None
