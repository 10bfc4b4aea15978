"""What every test shares: one thread, no network, a fixed budget of examples, a tiny checkpoint."""

import dataclasses
import os
import sys

import pytest
from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
_worker, _workers = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _cores and _workers > 1:
    # Each worker of the suite has cores of its own, its child processes too: threads of one that wait for a core that
    # another computes on make both several times slower.
    _own = int(_worker.removeprefix("gw"))
    os.sched_setaffinity(0, _cores[_own::_workers] or {_cores[_own % len(_cores)]})

settings.register_profile(
    "adasearch", deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("adasearch")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a tiny Llama with random float32 weights and a byte-level tokenizer."""
    from tests.tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


FRESH = (
    "tests/tuning/test_export",
    "tests/contracts/test_export",
    "tests/test_outlined.py::test_an_export_opens_as_the_same_model[mixed",
    "tests/test_real_model",
)
"""Tests whose exports are opened in a fresh process, as a user's are; it takes seconds of imports each time."""


@pytest.fixture(autouse=True)
def exports_are_opened_here(request, monkeypatch):
    """Open the exports of all other tests in this process, by the function that the fresh one calls."""
    verify = sys.modules.get("adasearch.tuning.export._verify")
    if verify is not None and not request.node.nodeid.startswith(FRESH):
        monkeypatch.setattr(verify, "_open_fresh", verify.open_and_compare)


@pytest.fixture(autouse=True, scope="module")
def exports_are_measured_here(request):
    """Measure exports in this process too, with less work; `tests/test_speed.py` asks a fresh one."""
    speed = sys.modules.get("adasearch.speed")
    if speed is None or request.node.nodeid.startswith(("tests/test_speed", "tests/test_real_model")):
        yield
        return

    def here(asked):
        return speed.measure(dataclasses.replace(asked, threads=1, prompt=8, written=2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "_ask", here)
        patch.setattr(speed, "_MOST", 3)
        yield
