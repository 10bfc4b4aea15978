"""What every export format and every family must hold: it opens as the same model, whatever was cut."""

from __future__ import annotations

import errno
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from adasearch import loading, modeling_adasearch
from adasearch.config import component
from adasearch.errors import StorageError
from adasearch.registry import EXPORT
from adasearch.tuning.export import _folder, _verify
from tests.tuning.test_export import BYTES, LAYERS, UNEVEN, make_case

FAMILIES = sorted(modeling_adasearch.MODELS)
FORMATS = EXPORT.names()


@pytest.fixture(autouse=True)
def _in_process(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    room = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", room)
    monkeypatch.syspath_prepend(room)


@pytest.mark.parametrize("name", FORMATS)
def test_entry(name: str) -> None:
    entry = EXPORT.get(name)
    assert list(inspect.signature(entry.function).parameters) == ["goods", "folder", "options", "overwrite"]
    assert list(inspect.signature(entry.facts["open"]).parameters) == ["folder", "device"]
    assert entry.name == name
    assert component(EXPORT, component(EXPORT, name, "").to_dict(), "").options == entry.options()


def test_labels_tell_formats_apart() -> None:
    labels = [EXPORT.get(name).options().label for name in FORMATS]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("attention", ["kv_group", "head"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_opens_as_the_same_model(name: str, family: str, attention: str, tmp_path: Path) -> None:
    widths = [(min(a, 2), m) for a, m in UNEVEN] if attention == "head" else UNEVEN
    case = make_case(family, tmp_path, widths, attention=attention, vocab_size=BYTES)
    report = case.export(tmp_path / "out", name=name)
    assert report.verified.sound
    assert report.verified.cache_agrees
    assert report.format == name
    opened: Any = loading.load(tmp_path / "out")
    assert sum(p.numel() for p in opened.parameters()) == report.parameters == case.plan.parameters + report.padding
    assert len(opened.model.layers) == LAYERS
    later = loading.verify(tmp_path / "out", fresh=False)
    assert later.sound
    assert later.parameters == report.parameters
    listed = {line.split("  ")[1] for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()}
    written = {str(p.relative_to(tmp_path / "out")) for p in _folder.files_of(tmp_path / "out")}
    assert written == listed | {"SHA256SUMS"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["begin", "end"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_nothing(name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)

    def full(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if moment == "begin":
        monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full)
        monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", full)
    else:
        monkeypatch.setattr(_folder, "seal", full)
    with pytest.raises(StorageError, match="the disk is full"):
        case.export(tmp_path / "out", name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_foreign_folder_is_refused(name: str, tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="must be empty"):
        case.export(tmp_path / "out", name=name, overwrite=True)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("attention", ["kv_group", "head", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_hf(family: str, attention: str, biases: bool, tmp_path: Path) -> None:
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
