"""What a process may use of its machine: affinity and control groups of both versions, read from made-up trees."""

from __future__ import annotations

import os

import pytest

from adasearch.environment import (
    forget_peak_memory,
    free_memory,
    local_machine,
    machine,
    peak_memory,
    usable_cores,
)

GIB = 2**30
HERE = len(os.sched_getaffinity(0))


def tree(root, files):
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    8388608 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_control_groups_all_that_is_free_counts(tmp_path):
    root = tree(tmp_path, {})
    assert usable_cores(root) == HERE
    assert free_memory(root) == 8 * GIB


@pytest.mark.parametrize("place", ["", "/kubepods/pod1"])
def test_the_second_version_limits_time_and_memory(tmp_path, place):
    group = f"sys/fs/cgroup{place}"
    files = {
        "proc/self/cgroup": f"0::{place or '/'}\n",
        f"{group}/cpu.max": "100000 100000\n",
        f"{group}/memory.max": f"{4 * GIB}\n",
        f"{group}/memory.current": f"{3 * GIB}\n",
        f"{group}/memory.stat": f"anon 5\nfile {2 * GIB}\n",
    }
    root = tree(tmp_path, files)
    assert usable_cores(root) == 1
    assert free_memory(root) == 3 * GIB


def test_a_limit_further_up_counts_and_no_limit_does_not(tmp_path):
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/cpu.max": "max 100000\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": "5\n",
        "sys/fs/cgroup/user/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/user/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/user/memory.current": f"{2 * GIB}\n",
    }
    root = tree(tmp_path, files)
    assert usable_cores(root) == 1, "half a core is still one"
    assert free_memory(root) == 0


def test_the_first_version_has_a_folder_for_each_controller(tmp_path):
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/box\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache {GIB // 2}\n",
    }
    root = tree(tmp_path, files)
    assert usable_cores(root) == 1
    assert free_memory(root) == GIB + GIB // 2


def test_affinity_counts_not_what_is_built_in():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
        assert machine()["cores"] == "1"
        assert local_machine().cores == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system cannot forget a peak of memory")
def test_the_peak_of_memory_is_counted_anew():
    block = b"x" * (200 * 2**20)
    forget_peak_memory()
    before = peak_memory()
    del block
    forget_peak_memory()
    assert 2**20 < peak_memory() < before - 150 * 2**20
