import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adasearch.errors import StorageError
from adasearch.search import lease
from adasearch.search.lease import check, hold


def forged(run, **over):
    """Write the lease of another driver, by default one that runs on another host."""
    run.mkdir(exist_ok=True)
    holder = {**lease._identity(), "host": "elsewhere", "pid": 4242, "nonce": "n", "since": 0.0, **over}
    (run / "lease.json").write_text(json.dumps(holder))


def test_it_is_there_while_held_and_gone_after(tmp_path):
    with hold(tmp_path / "run"):
        data = json.loads((tmp_path / "run" / "lease.json").read_text())
        assert data["pid"] == os.getpid()
        assert data["nonce"]
        check(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_one_process_may_hold_it_nested(tmp_path):
    with hold(tmp_path):
        with hold(tmp_path):
            check(tmp_path)
        check(tmp_path)


def test_another_hosts_fresh_lease_is_respected_and_a_stale_one_taken(tmp_path):
    forged(tmp_path)
    with pytest.raises(StorageError, match="held by process 4242 on host elsewhere"), hold(tmp_path):
        pass
    os.utime(tmp_path / "lease.json", (time.time() - 61,) * 2)
    with hold(tmp_path):
        check(tmp_path)


@pytest.mark.parametrize("over", [{"pid": 2**22 + 1}, {"pid": os.getpid(), "started": "1"}, {"boot": "another"}])
def test_a_holder_that_is_gone_from_this_host_is_replaced_at_once(tmp_path, over):
    forged(tmp_path, **{"host": lease._identity()["host"], **over})
    with hold(tmp_path):
        check(tmp_path)


def test_another_container_of_this_host_is_judged_by_the_clock(tmp_path):
    forged(tmp_path, host=lease._identity()["host"], space="pid:[1]", pid=2**22 + 1)
    with pytest.raises(StorageError, match="held by"), hold(tmp_path):
        pass


def test_a_living_process_of_this_host_is_respected(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from adasearch.search.lease import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(StorageError, match=f"process {process.pid}"), hold(tmp_path):
        pass
    process.kill()
    process.wait()
    with hold(tmp_path):
        check(tmp_path)


def test_a_damaged_lease_is_respected_while_it_is_fresh(tmp_path):
    (tmp_path / "lease.json").write_text("{")
    with pytest.raises(StorageError, match="another driver"), hold(tmp_path):
        pass


def test_a_driver_whose_lease_was_taken_notices_and_leaves_the_new_one(tmp_path):
    with hold(tmp_path):
        forged(tmp_path)
        with pytest.raises(StorageError, match="this driver's lease is held by process 4242"):
            check(tmp_path)
    assert json.loads((tmp_path / "lease.json").read_text())["host"] == "elsewhere"


def test_it_is_kept_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "REFRESH_SECONDS", 0.05)
    with hold(tmp_path):
        os.utime(tmp_path / "lease.json", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lease.json").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "lease.json").stat().st_mtime > 0


def test_a_stale_lease_that_another_driver_replaced_meanwhile_is_put_back(tmp_path):
    forged(tmp_path, nonce="new")
    lease._take_away(tmp_path / "lease.json", {"nonce": "old"})
    assert json.loads((tmp_path / "lease.json").read_text())["nonce"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
