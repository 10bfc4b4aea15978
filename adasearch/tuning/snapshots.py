"""Checkpoints of a training run: one file, replaced whole, that names what it belongs to.

A checkpoint is never used for anything but the run that it was made in: it carries a digest of each part that decides
what the run would be. Where one differs it is left as it is, and an error names the part.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adasearch.errors import StorageError, TrialError
from adasearch.records import writing_atomically

SCHEMA = 1


def digest(tensors: Iterable[Tensor | None]) -> str:
    """Return 16 hexadecimal digits that tell tensors from any others, None being one of its own."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(b"-" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor is not None:
            found.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class _Noting:
    """A file that remembers why it could not be written to: torch answers with an error that says nothing of it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written: int = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        return written

    def flush(self) -> None:
        self._file.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshots:
    """The checkpoint of one run.

    Args:
        path: its file.
        parts: digest by what it is of, such as ``plan``; a checkpoint with other ones is of another run.
    """

    path: Path
    parts: Mapping[str, str]

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last, its tensors mapped from the file; None where there is none.

        A damaged file counts as none, as everywhere in a run folder.

        Raises:
            TrialError: it belongs to another run (kind ``config``); the message says in what that differs.
        """
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return None
        if not isinstance(held, dict) or held.get("schema") != SCHEMA:
            return None
        theirs = dict(held["parts"])
        other = [name for name in dict.fromkeys((*self.parts, *theirs)) if theirs.get(name) != self.parts.get(name)]
        if other:
            problem = f"{self.path}: a checkpoint must be of the run that it is resumed in, given one of another"
            remedy = "set back what was changed, or delete the file to begin anew"
            raise TrialError("config", f"{problem} {', another '.join(other)}; {remedy}", "recover")
        state: dict[str, Any] = held["state"]
        return state

    def save(self, state: Mapping[str, Any]) -> str | None:
        """Put `state` in the place of what was saved before; that stays whole until the new file is.

        Returns:
            why it could not be written, such as a full disk, in words for a user whose training goes on; None where it
            was.
        """
        for draft in self.path.parent.glob(f".{self.path.name}.*.tmp"):  # of a process that was killed while it wrote
            draft.unlink(missing_ok=True)
        try:
            with writing_atomically(self.path) as file:
                noting: Any = _Noting(file)
                try:
                    torch.save({"schema": SCHEMA, "parts": dict(self.parts), "state": dict(state)}, noting)
                except RuntimeError:
                    if noting.error is not None:
                        raise noting.error from None
                    raise
        except StorageError as error:
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else str(error)
            return f"{self.path}: {reason}; the former one stays"
        return None
