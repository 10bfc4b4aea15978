"""One driver at a time: the lease of a run folder, ``lease.json``.

Its file is created exclusively and touched every ten seconds. Whoever finds it may take it over when it has not been
touched for a minute by the clock of its own file system, or at once when its process is gone from this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from adasearch.errors import StorageError
from adasearch.records import storage_errors

REFRESH_SECONDS = 10.0
STALE_SECONDS = 60.0
_FILE = "lease.json"
_IDENTITY = ("host", "boot", "space", "pid", "started")


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process started, in clock ticks since boot; empty where it is gone or cannot be asked."""
    # the second field is the command's name in brackets and may hold anything, spaces and brackets too
    fields = _read_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _process_space() -> str:
    """Return which process numbering this process lives in; containers of one host have one each."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _identity() -> dict[str, str | int]:
    """Return what tells this process from all others."""
    pid = os.getpid()
    boot = _read_line("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": boot,
        "space": _process_space(),
        "pid": pid,
        "started": _started(pid),
    }


def _read(path: Path) -> dict[str, str | int]:
    """Return what a lease says, empty where it says nothing that can be read."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_gone(holder: dict[str, str | int]) -> bool:
    """Return whether the holder is certainly no longer running; False where that cannot be told from here."""
    me = _identity()
    if holder.get("host") != me["host"]:
        return False
    if holder.get("boot") != me["boot"]:
        return True
    if holder.get("space") != me["space"]:
        return False
    try:
        pid = int(holder.get("pid", 0))
    except ValueError:
        return False
    if me["started"]:
        return _started(pid) != holder.get("started")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _age(path: Path) -> float:
    """Return the seconds since a file was touched, by the clock of its file system."""
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _is_mine(holder: dict[str, str | int]) -> bool:
    me = _identity()
    return all(holder.get(key) == me[key] for key in _IDENTITY)


def _take_away(path: Path, stale: dict[str, str | int]) -> None:
    """Move a stale lease aside; one that another driver has put in its place meanwhile is put back."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.stale")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != stale:
        with contextlib.suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _create(path: Path, nonce: str) -> bool:
    """Create the lease; False if there is one."""
    text = json.dumps({**_identity(), "nonce": nonce, "since": time.time()})
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return True


def _refresh(path: Path, nonce: str, stop: threading.Event) -> None:
    while not stop.wait(REFRESH_SECONDS):
        if _read(path).get("nonce") != nonce:
            return
        with contextlib.suppress(OSError):
            os.utime(path)


def check(run: Path) -> None:
    """Make sure that this process still holds the lease of `run`.

    Raises:
        StorageError: it does not, so it must stop without writing.
    """
    holder = _read(run / _FILE)
    if not _is_mine(holder):
        who = f"held by {_name(holder)}" if holder else "gone"
        raise StorageError(f"{run / _FILE}: this driver's lease is {who}; it stops without writing")


def _name(holder: dict[str, str | int]) -> str:
    return f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}" if holder else "another driver"


@contextlib.contextmanager
def hold(run: Path) -> Iterator[None]:
    """Hold the lease of the run folder `run`, which is made if it is not there. A process may hold it nested.

    Raises:
        StorageError: another driver holds it, or the folder is not writable.
    """
    path = run / _FILE
    with storage_errors(path):
        run.mkdir(parents=True, exist_ok=True)
        nonce = uuid.uuid4().hex
        for _ in range(3):
            if _create(path, nonce):
                break
            holder = _read(path)
            if holder and _is_mine(holder):
                nonce = ""
                break
            if not (holder and _is_gone(holder)) and _age(path) < STALE_SECONDS:
                problem = f"the run is held by {_name(holder)}; wait for it, or end it and run the same command again"
                raise StorageError(f"{path}: {problem}")
            _take_away(path, holder)
        else:
            raise StorageError(f"{path}: another driver took the run at the same moment")
    if not nonce:
        yield
        return
    stop = threading.Event()
    threading.Thread(target=_refresh, args=(path, nonce, stop), daemon=True, name="lease").start()
    try:
        yield
    finally:
        stop.set()
        if _read(path).get("nonce") == nonce:
            path.unlink(missing_ok=True)
