"""Losses that were computed once, on disk: searches for layers to remove ask for the same ones again and again.

One file holds the losses of one model on one sample, a line of JSON for each set of sublayers. Lines are appended
whole, so several processes may write; a line that is not whole, or not finite, is as if it were not there.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path


class LossBook:
    """A function from sets of sublayers to losses that remembers what it was told.

    Args:
        path: of the file; it and its folder are made when something is written.
        compute: gives the loss without some sublayers (module paths).
    """

    def __init__(self, path: Path, compute: Callable[[frozenset[str]], float]) -> None:
        self._path = path
        self._compute = compute
        self._known = dict(_lines(path))

    def __call__(self, gone: frozenset[str]) -> float:
        """Return the loss without the sublayers `gone`, computed where no process has written it down."""
        if gone not in self._known:
            self._known[gone] = self._compute(gone)
            self._write(gone)
        return self._known[gone]

    def _write(self, gone: frozenset[str]) -> None:
        line = json.dumps({"gone": sorted(gone), "loss": self._known[gone]}) + "\n"
        with contextlib.suppress(OSError):  # a cache that cannot be written is a slow one
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)


def _lines(path: Path) -> list[tuple[frozenset[str], float]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            data = json.loads(line)
            loss = float(data["loss"])
            if math.isfinite(loss):
                found.append((frozenset(map(str, data["gone"])), loss))
    return found
