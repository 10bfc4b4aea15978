"""Statistics on disk, by content: shared by the workers of a machine, bounded, deletable, extended where it can be.

There is one file per sample and family, ``<key>-<sequences>.<family>.safetensors``, written beside its place and
renamed, so any number of processes may read, write and be killed at any time; a damaged file counts as absent.

Samples of one key are nested: the first n sequences of a larger one are the sample of n. What a smaller sample left
behind is therefore extended by the sequences that it lacks. A sample smaller than all that are stored is computed:
keeping a sample in pieces, so that its beginnings could be read out, would multiply the files and the merging for the
one direction in which computing is cheap. The families of ``LARGE`` hold numbers per weight, which mostly an extension
reads; they are kept where one of them takes a fair share of the folder, and are the first to go.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from adasearch.errors import DataError, StorageError
from adasearch.pruning import statistics
from adasearch.pruning.statistics import FAMILIES, LARGE, Statistics

_ABANDONED_SECONDS = 3600.0
_PATIENCE = 600.0
"""Seconds to wait for a process that computes the same; then it counts as stuck, and the work is done twice."""
_POLL = 0.05
_SUMS_SHARE = 0.25
"""Of the folder, that the file of one family of sums may take."""


class Origin(Protocol):
    """Where statistics come from that are not on disk."""

    def accumulate(self, first: int, stop: int, families: frozenset[str]) -> Statistics:
        """Return families of `ACCUMULATORS` of the sequences from `first` to `stop` (excluded) of the sample."""

    def read(self, merged: Statistics, needs: frozenset[str], sequences: int) -> Statistics:
        """Return the families in `needs` of a sample, given those that they follow from (`statistics.merged_from`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A folder of statistics.

    Args:
        folder: made when it is missing; may be deleted at any time.
        max_bytes: that the statistics in it may take.
    """

    folder: Path
    max_bytes: int = 4 * 1024**3

    def obtain(self, key: str, sequences: int, needs: frozenset[str], origin: Origin) -> Statistics:
        """Return the statistics in `needs`, from disk where they are, computed and stored where they are not.

        Of several processes that lack the same, one computes and the others wait for it. Statistics extended from a
        smaller sample equal those computed at once up to the rounding of sums (1e-6 relative, float32).

        Args:
            key: fingerprint of all that the statistics depend on but the number of sequences: weights, structure,
                corpus, length, draw; letters, digits, ``._-``.
            sequences: of the sample.
            needs: families.
            origin: computes what is missing.

        Raises:
            StorageError: the folder cannot be written.
        """
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key), f"no file name: {key!r}"
        found = self._stored(key, sequences, needs)
        missing = needs - set(found)
        if missing:
            with contextlib.ExitStack() as stack:
                for need in sorted(missing):  # in one order everywhere, so that no two processes wait for each other
                    stack.enter_context(locked(self._place(key, sequences, need).with_suffix(".lock")))
                found |= self._stored(key, sequences, missing)
                missing = needs - set(found)
                found |= self._compute(key, sequences, missing, origin) if missing else {}
        return statistics.union(found.values())

    def _place(self, key: str, sequences: int, family: str) -> Path:
        return self.folder / f"{key}-{sequences}.{family}.safetensors"

    def _stored(self, key: str, sequences: int, families: frozenset[str]) -> dict[str, Statistics]:
        parts = {family: _read(self._place(key, sequences, family)) for family in sorted(families)}
        return {family: part for family, part in parts.items() if part is not None}

    def _compute(self, key: str, sequences: int, needs: frozenset[str], origin: Origin) -> dict[str, Statistics]:
        """Return `needs`, each extended from the largest smaller sample that it can be; store them."""
        starts: dict[int, set[str]] = {}
        for need in needs:
            starts.setdefault(self._start(key, sequences, statistics.merged_from(need)), set()).add(need)
        found: dict[str, Statistics] = {}
        for stored, family in starts.items():
            bases = frozenset[str]().union(*map(statistics.merged_from, family))
            before = self._stored(key, stored, bases) if stored else {}
            start = stored if set(before) == bases else 0  # deleted by another process since, or damaged
            merged = origin.accumulate(start, sequences, bases)
            if start:
                merged = statistics.merge(statistics.union(before.values()), merged)
            fresh = origin.read(merged, frozenset(family), sequences)
            parts = {name: merged.only(name) for name in sorted(bases & LARGE)}
            parts = {name: part for name, part in parts.items() if _size(part) <= _SUMS_SHARE * self.max_bytes}
            parts |= {need: fresh.only(need) for need in sorted(family)}
            found |= {need: parts[need] for need in family} | self._keep(key, sequences, parts, frozenset(family))
        return found

    def _start(self, key: str, sequences: int, bases: frozenset[str]) -> int:
        """Return the size of the largest smaller sample of which all of `bases` are stored, 0 where there is none."""
        sizes: list[set[int]] = []
        for base in bases:
            pattern = re.compile(rf"{re.escape(key)}-(\d+)\.{base}\.safetensors")
            with contextlib.suppress(OSError):
                names = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
                sizes.append({int(name[1]) for name in names if name})
        common = set.intersection(*sizes) if sizes else set()
        return max((size for size in common if size < sequences), default=0)

    def _keep(
        self, key: str, sequences: int, parts: dict[str, Statistics], needs: frozenset[str]
    ) -> dict[str, Statistics]:
        """Store `parts` and return those of `needs` that stayed, mapped from their files: processes share the pages."""
        try:
            for family, part in parts.items():
                _write(part, self._place(key, sequences, family))
            shrink(self.folder, self.max_bytes, _rank)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"the cache folder {self.folder} must be writable: {error}") from error
        return self._stored(key, sequences, needs)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, made with its folder, for a while; the system lets go of it when the process dies.

    Where the file system has no locks, or the holder is stuck, the work may be done twice, which harms nobody.

    Raises:
        StorageError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise StorageError(f"the cache folder {path.parent} must be writable: {error}") from error
    with file:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL)
                continue
            except OSError:
                pass
            break
        with contextlib.suppress(OSError):
            os.utime(path)
        yield


def _size(part: Statistics) -> int:
    return sum(t.numel() * t.element_size() for t in part.tensors.values())


@functools.lru_cache(maxsize=4096)
def _whole(path: Path, identity: tuple[int, int, int]) -> bool:  # noqa: ARG001 - a file is read once by each process
    try:
        statistics.load(path)
    except DataError:
        return False
    return True


def _read(path: Path) -> Statistics | None:
    """Return what a file holds, None where it is absent or damaged; its access time becomes now.

    The checksum is computed (3 GB a second) when a process first meets the file; files are replaced, never changed.
    """
    try:
        state = path.stat()
        if not _whole(path, (state.st_ino, state.st_size, state.st_mtime_ns)):
            return None
        found = statistics.load(path, verify=False)
        os.utime(path, ns=(time.time_ns(), state.st_mtime_ns))
    except (OSError, DataError):  # never there, or evicted by another process since
        return None
    return found


def _write(part: Statistics, path: Path) -> None:
    """Put a file in its place as a whole. A power cut may still empty it: its checksum tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        statistics.save(part, draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _rank(name: str) -> bool | None:
    """Return whether a file of statistics is kept longer than others, None for files of another kind."""
    family = next((family for family in FAMILIES if name.endswith(f".{family}.safetensors")), None)
    return None if family is None else family not in LARGE


def shrink(folder: Path, max_bytes: int, rank: Callable[[str], bool | None]) -> None:
    """Delete what killed processes left behind, then the files used longest ago, until the rest fits.

    Args:
        folder: of a cache.
        max_bytes: that its files may take.
        rank: whether a file of this name goes after the others; None for names that are not to be touched.
    """
    files: list[tuple[bool, float, int, Path]] = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process shrinks the folder too
            state, late = path.stat(), rank(path.name)
            if path.suffix in {".part", ".lock"} and time.time() - state.st_mtime > _ABANDONED_SECONDS:
                path.unlink()  # whoever holds such a lock for so long may see its work done twice
            elif late is not None:
                files.append((late, state.st_atime, state.st_size, path))
    total = sum(size for *_, size, _ in files)
    for *_, size, path in sorted(files):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
