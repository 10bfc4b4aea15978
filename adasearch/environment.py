"""What figures depend on beside the study: versions and the machine, as far as this process may use it."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import socket
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from adasearch.placement import Machine

PACKAGES = ("adasearch", "torch", "transformers", "optuna", "botorch", "ray", "datasets", "lm_eval", "pandas")
_KIB = 1024


def versions() -> dict[str, str]:
    """Return the version of each package that can change a figure."""
    return {name: metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, str]:
    """Return the name, usable cores and system of this machine."""
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": str(usable_cores()),
    }


def local_machine() -> Machine:
    """Return what this machine offers this process now; its GPUs are looked at, not used."""
    from adasearch.models import gpu_sizes

    return Machine(cores=usable_cores(), memory=free_memory(), gpus=gpu_sizes())


def usable_cores(root: Path = Path("/")) -> int:
    """Return how many cores this process may use: its affinity, or less where a control group gives it less time.

    Args:
        root: of the file system that tells of control groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas(root))]))


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes this process may still take: what is free, or less under the limit of a control group.

    Pages that the kernel only keeps for files count as free.

    Args:
        root: of the file system that tells of memory and control groups.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * _KIB for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux: all that is built in
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min([free, *_rests(root)]))


def forget_peak_memory() -> None:
    """Let `peak_memory` count from now on; where the system cannot (not Linux), it counts from the process's start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set size


def peak_memory() -> int:
    """Return the greatest resident memory of this process since `forget_peak_memory` (bytes), mapped files included."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * _KIB for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups, own and above, that limit this process (version 2, or 1)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        mount = root / "sys/fs/cgroup" / names
        place = mount / path.lstrip("/")
        # In a container the path is that of the host, and the mount itself is the own group: then only that exists.
        yield from (folder for folder in [place, *place.parents] if folder.is_relative_to(mount) and folder.is_dir())


def _number(path: Path) -> int | None:
    """Return the number in a file, None where there is no file or it says there is no limit."""
    try:
        return int(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _quotas(root: Path) -> Iterator[float]:
    """Yield the cores that each control group allows on average."""
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        try:
            first, second = (group / "cpu.max").read_text().split()
            quota, period = (None if first == "max" else int(first)), int(second)
        except (OSError, ValueError):
            pass
        if quota and period and quota > 0:
            yield quota / period


def _rests(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group leaves: its limit less what it holds beside pages of files."""
    names = (("memory.max", "memory.current", "file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache"))
    for group in _groups(root, "memory"):
        for limit_name, used_name, cache_name in names:
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is None or used is None:
                continue
            try:
                pairs = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                cache = int(pairs.get(cache_name, 0))
            except (OSError, ValueError):
                cache = 0
            yield limit - used + min(cache, used)
