"""What every export format and every family must hold: it opens as the same model, whatever was cut."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from adasearch import loading, modeling_adasearch
from adasearch.registry import EXPORT
from adasearch.tuning.export import _verify
from tests.tuning.test_export import LAYERS, UNEVEN, make_case


@pytest.mark.parametrize("name", EXPORT.names())
def test_signature(name: str) -> None:
    parameters = list(inspect.signature(EXPORT.get(name).function).parameters)
    assert parameters[:6] == ["model", "base", "structure", "plan", "folder", "card"]
    assert EXPORT.get(name).name == name


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("attention", ["kv_group", "head", "none"])
@pytest.mark.parametrize("family", sorted(modeling_adasearch.MODELS))
def test_round_trip(family: str, attention: str, biases: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    widths = [(min(a, 2), m) for a, m in UNEVEN] if attention == "head" else UNEVEN
    case = make_case(family, tmp_path, widths, biases=biases, attention=attention, tie_word_embeddings=biases)
    report = case.export(tmp_path / "out")
    assert report.layout == "per_layer"
    assert report.verified.difference == 0.0
    assert report.verified.cache_agrees
    opened = loading.load(tmp_path / "out")
    assert torch.equal(_verify.logits_of(opened), _verify.logits_of(case.model))
    assert sum(p.numel() for p in opened.parameters()) == case.plan.parameters
    assert len(opened.model.layers) == LAYERS
