"""What every test shares: one thread, no network, a fixed budget of examples, a tiny checkpoint."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "adasearch", deadline=None, max_examples=30, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("adasearch")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Folder of a tiny Llama with random float32 weights and a byte-level tokenizer."""
    from tests.tiny import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-llama")


FRESH = ("tests/tuning/test_export", "tests/contracts/test_export", "tests/test_outlined", "tests/test_real_model")
"""Modules whose exports are opened in a fresh process, as a user's are; it takes seconds of imports each time."""


@pytest.fixture(autouse=True)
def exports_are_opened_here(request, monkeypatch):
    """Open the exports of all other tests in this process, by the function that the fresh one calls."""
    verify = sys.modules.get("adasearch.tuning.export._verify")
    if verify is not None and not request.node.nodeid.startswith(FRESH):
        monkeypatch.setattr(verify, "_open_fresh", verify.open_and_compare)
