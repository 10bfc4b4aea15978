"""Speed and memory of exports: what is measured, where it is told, and that an export stays sound under a new card."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from gguf import GGUFReader

from adasearch import costs, loading, models, records, report, speed, verdicts
from adasearch.cli import main
from adasearch.documents import plain
from adasearch.errors import ModelError
from adasearch.records import FinalRecord, Rate, Speed, read_finals, write_final
from adasearch.report_speed import speed_section
from adasearch.tuning.export import _card, _folder, _verify, gguf
from tests.test_main_job import study_file
from tests.tiny import save_checkpoint
from tests.tuning.test_export import BYTES, UNEVEN, make_case

RATE = Rate(own=30.0, dense=20.0, gain=1.5, spread=0.1)
FOUND = Speed(format="hf", file_bytes=2**20, dense_file_bytes=2**21, prefill=RATE, decode=RATE, peak_bytes=3 * 2**20,
              dense_peak_bytes=4 * 2**20, bare_bytes=2**20, device="cpu", dtype="float32", threads=2, prompt=128,
              written=16)  # fmt: skip
FILES = Speed(format="gguf-f16", file_bytes=2**20, dense_file_bytes=0, dtype="f16")


def final_of(name="trial3", **changes):
    told = FinalRecord(name=name, trial=3, role="finalist", recipe=None, selected=(), report=(), perplexity={},
                       parameters=10, removed=0.2, seconds={}, export=None, losses=())  # fmt: skip
    return dataclasses.replace(told, **changes)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Run folder with a dense model and one export of it, whose layers differ."""
    folder = tmp_path_factory.mktemp("speed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
        case = make_case("llama", folder / "case", UNEVEN)
        case.export(folder / "export" / "trial3")
    save_checkpoint(folder / "dense", "llama", num_hidden_layers=len(UNEVEN))
    return folder


@pytest.fixture
def run(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "run"))


def test_work_takes_turns_and_each_goes_first_as_often():
    order = []

    def work(name, seconds):
        def done():
            order.append(name)
            return seconds

        return done

    times = costs.in_turns(work("a", 1.0), work("b", 2.0), least=4, most=4)
    assert times.tolist() == [[1.0, 2.0]] * 4
    assert order == ["a", "b", *["a", "b"], *["b", "a"], *["a", "b"], *["b", "a"]]


def test_a_rate_is_the_median_and_a_gain_that_of_neighbours():
    own, dense = iter([9.0, 1.0, 2.0, 8.0]), iter([9.0, 2.0, 4.0, 12.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "PAIRS_SECONDS", -1.0)
        found = speed.rate(16, lambda: next(own), lambda: next(dense))
    assert (found.own, found.dense, found.gain) == (16 / 2.0, 16 / 4.0, 2.0)
    assert found.spread == costs.median_error(np.array([2.0, 2.0, 1.5]))


def test_what_is_written_is_what_the_model_would_write(exported):
    """The timed loop is greedy decoding with a cache, token for token."""
    model = loading.load(exported / "export" / "trial3")
    ids = torch.arange(12)[None]
    wanted = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
    )
    fed = []
    handle = model.register_forward_pre_hook(lambda _, args, told: fed.append(told["input_ids"]), with_kwargs=True)
    with torch.inference_mode():
        assert speed.decode_seconds(model, ids, 5) > 0
    handle.remove()
    assert [tuple(x.shape) for x in fed] == [(1, 12), *[(1, 1)] * 5]
    assert torch.cat(fed[1:], dim=1).tolist() == wanted[:, 12:17].tolist()


def test_both_models_are_timed_and_memory_is_told(exported):
    asked = speed.Request(folder=str(exported / "export" / "trial3"), dense=str(exported / "dense"), device="cpu",
                          threads=1, prompt=12, written=3)  # fmt: skip
    found = speed.measure(asked)
    assert found.dtype == "float32"
    assert found.peak_bytes >= found.bare_bytes > 0
    for rate in (found.prefill, found.decode):
        assert min(rate.own, rate.dense, rate.gain) > 0
        assert rate.spread >= 0
    assert speed.measure(dataclasses.replace(asked, dense=None)).prefill is None


def test_memory_is_that_of_a_process_of_its_own(exported):
    asked = speed.Request(folder=str(exported / "dense"), dense=None, device="cpu", threads=1, prompt=8, written=2)
    here = torch.zeros(64 * 2**20)  # 256 MiB of this process, no matter of the other
    here += 1
    found = speed._ask(asked)
    assert found.bare_bytes < found.peak_bytes
    assert found.bare_bytes > 2**20
    with pytest.raises(ModelError, match="readable config"):
        speed._ask(dataclasses.replace(asked, folder=str(exported / "nothing")))


def scale_of(run, monkeypatch, *, installed):
    monkeypatch.setattr(models, "resolve", lambda model: model)
    monkeypatch.setattr(models, "fetch_weights", lambda *_: run / "dense")
    monkeypatch.setattr(speed.llama_cpp, "installed", lambda: installed)
    study = SimpleNamespace(cluster=SimpleNamespace(gpus_per_worker=0), model=SimpleNamespace(dtype="float32"))
    return speed.Scale(study, run)


def test_a_gguf_file_is_timed_beside_the_dense_model_in_its_number_format(tmp_path, monkeypatch):
    case = make_case("llama", tmp_path / "case", UNEVEN, vocab_size=BYTES)
    case.export(tmp_path / "export" / "trial3", gguf.GgufOptions(dtype="q8_0"), name="gguf")
    monkeypatch.setattr(models, "open_base", lambda _: case.base)
    (tmp_path / "dense").mkdir()
    asked = []

    def answer(request):
        (name,) = [part for part in (request.dense, request.folder) if part and ".dense-" in part]
        header = GGUFReader(Path(name) / loading.GGUF)
        assert {str(t.tensor_type.name) for t in header.tensors} <= {"F32", "F16", "Q8_0"}
        widths = {tuple(int(n) for n in t.shape) for t in header.tensors if "ffn_up" in t.name}
        assert widths == {(48, 40)}, "no channel is gone"
        asked.append(request)
        return speed.Answer(bare_bytes=1, peak_bytes=5 if request.dense else 7, prefill=RATE, decode=RATE)

    monkeypatch.setattr(speed, "_ask", answer)
    (tmp_path / ".dense-of-a-driver-that-was-killed").mkdir()
    scale = scale_of(tmp_path, monkeypatch, installed=True)
    assert not list(tmp_path.glob(".dense-*"))
    found = scale.speed(tmp_path / "export" / "trial3", "gguf-q8_0")
    assert [(a.reader, a.device, a.dense is None) for a in asked] == [("llama_cpp", "cpu", i == 0) for i in range(2)]
    assert (found.prefill, found.peak_bytes, found.dense_peak_bytes, found.dtype) == (RATE, 5, 7, "q8_0")
    assert found.file_bytes < found.dense_file_bytes < 4 * found.file_bytes
    assert not list(tmp_path.glob(".dense-*")), "the dense file is gone"
    assert "| llama.cpp, batch 1, cpu" in "| " + _card.speed_lines(found)[2]
    assert "llama.cpp, q8_0" in speed_section(findings_of(final_of(speeds=(found,))))


def test_a_gguf_file_has_its_size_alone_without_llama_cpp(tmp_path, monkeypatch):
    case = make_case("llama", tmp_path / "case", UNEVEN, vocab_size=BYTES)
    case.export(tmp_path / "out", gguf.GgufOptions(dtype="f16"), name="gguf")
    (tmp_path / "dense").mkdir()
    found = scale_of(tmp_path, monkeypatch, installed=False).speed(tmp_path / "out", "gguf-f16")
    assert found.file_bytes == (tmp_path / "out" / loading.GGUF).stat().st_size
    assert (found.prefill, found.decode, found.peak_bytes, found.dense_file_bytes) == (None, None, 0, 0)
    card = "\n".join(_card.speed_lines(found))
    assert "pip install xllamacpp" in card
    assert "×" not in card, "what another number format saves is no gain of pruning"


def test_the_dense_model_is_timed_in_the_number_format_of_the_export(run, monkeypatch):
    scale = scale_of(run, monkeypatch, installed=False)
    told = run / "export" / "trial3" / "adasearch.json"
    told.write_text(told.read_text().replace('"float32"', '"bfloat16"'))
    asked, answer = [], speed.Answer(bare_bytes=1, peak_bytes=5, prefill=RATE, decode=RATE)
    monkeypatch.setattr(models, "fetch_weights", lambda _source, _cache, dtype: asked.append(dtype) or run / "dense")
    monkeypatch.setattr(speed, "_ask", lambda _: answer)
    (run / "dense" / "consolidated.safetensors").write_bytes(b"another copy of all weights")
    found = scale.speed(run / "export" / "trial3", "")
    assert asked == [torch.bfloat16]
    assert found.dense_file_bytes == (run / "dense" / "model.safetensors").stat().st_size


def test_a_disk_without_room_for_the_dense_file_is_said(tmp_path, monkeypatch):
    case = make_case("llama", tmp_path / "case", UNEVEN, vocab_size=BYTES)
    case.export(tmp_path / "out", gguf.GgufOptions(dtype="f16"), name="gguf")
    (tmp_path / "dense").mkdir()
    monkeypatch.setattr(models, "open_base", lambda _: case.base)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_write_file", full)
    with pytest.raises(ModelError, match="No space left"):
        scale_of(tmp_path, monkeypatch, installed=True).speed(tmp_path / "out", "gguf-f16")
    assert not list(tmp_path.glob(".dense-*"))


class _Scale:
    """Stands in for measuring: says what it is told."""

    def __init__(self, *_):
        pass

    def speed(self, folder, label):
        if label == "broken":
            raise ModelError("it does not open")
        return dataclasses.replace(FOUND, format=label or "hf")


def test_exports_are_measured_once_and_their_cards_and_records_say_so(run, monkeypatch):
    monkeypatch.setattr(speed, "Scale", _Scale)
    shutil.copytree(run / "export" / "trial3", run / "export" / "1-trial3.hf_uniform")
    shutil.copytree(run / "export" / "trial3", run / "export" / "1-trial3.broken")
    shutil.copytree(run / "export" / "trial3", run / "export" / "2-trial33")
    said = []
    finals = [final_of(), final_of("trial4"), final_of("trial5", speeds=(FILES,))]
    found = speed.measure_exports(None, run, finals, said.append)
    assert [speed_.format for speed_ in found[0].speeds] == ["hf", "hf_uniform"]
    assert found[1:] == finals[1:]
    assert said == [
        "measuring speed and memory of the exports beside the dense model",
        "1-trial3.broken: speed and memory are not known: it does not open",
    ]
    assert read_finals(run) == [found[0]]
    for name in ("trial3", "1-trial3.hf_uniform"):
        text = (run / "export" / name / "README.md").read_text()
        assert "| prefill, tokens/s | 30.0 | 20.0 | × 1.50 ± 0.10 |" in text
        assert text.index(_card.SPEED) < text.index(_card.MADE)
    assert _card.SPEED not in (run / "export" / "2-trial33" / "README.md").read_text()
    monkeypatch.setattr(speed, "Scale", None)
    assert speed.measure_exports(None, run, found, said.append) == found, "a run that goes on measures no more"


def test_cards_say_how_models_do_beside_others_and_claim_no_more(run, monkeypatch):
    gaps = {"dense": report.Difference(mean=-0.02, low=-0.03, high=-0.01), "recipe0": None,
            "recipe1": report.Difference(mean=0.01, low=-0.01, high=0.03)}  # fmt: skip
    monkeypatch.setattr(report, "difference", lambda _run, _own, other, _seed: gaps[other.name])
    for recipe in ("recipe0", "recipe1"):  # the first is the model itself
        found = SimpleNamespace(dense=final_of("dense"), recipe=final_of(recipe, recipe="flap"))
        monkeypatch.setattr(report, "gather", lambda *_, found=found: found)
        verdicts.pronounce(SimpleNamespace(seed=0), run, [final_of()])
        text = (run / "export" / "trial3" / "README.md").read_text()
        assert "Against the dense model: **worse by 2.0 points** (−2.0 points, 95 % interval −3.0 to −1.0)." in text
        assert ("the best published recipe, flap" in text) == (recipe == "recipe1")
    assert "**no difference shown** (+1.0 points, 95 % interval −1.0 to +3.0)" in text
    assert text.count(_card.VERDICT) == 1
    assert loading.verify(run / "export" / "trial3", fresh=False).sound


def test_a_card_that_was_amended_leaves_the_export_sound(run):
    folder = run / "export" / "trial3"
    before = (folder / "README.md").read_text()
    _folder.amend_card(folder, _card.speed_lines(FILES))
    _folder.amend_card(folder, _card.speed_lines(FOUND))
    text = (folder / "README.md").read_text()
    assert text.count(_card.SPEED) == 1
    assert "llama-bench" not in text
    assert text.replace("\n".join([*_card.speed_lines(FOUND), ""]), "") == before
    assert loading.verify(folder, fresh=False).sound
    assert [path.name for path in folder.parent.iterdir()] == ["trial3"]


def test_a_full_disk_leaves_the_old_card(run, monkeypatch):
    folder = run / "export" / "trial3"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_folder, "_place", full)
    with pytest.raises(records.StorageError, match="the disk is full"):
        _folder.amend_card(folder, _card.speed_lines(FOUND))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["trial3"]


def test_records_without_figures_are_read(tmp_path):
    write_final(tmp_path, final_of(speeds=(FOUND, FILES)))
    assert read_finals(tmp_path) == [final_of(speeds=(FOUND, FILES))]
    path = tmp_path / "final" / "trial3.json"
    body = plain(final_of())
    del body["speeds"]
    records._write_checked(path, body)
    assert read_finals(tmp_path) == [final_of()]


def findings_of(*finals):
    class Found:
        pass

    found = Found()
    found.finals = finals
    return found


def test_the_report_puts_the_dense_model_beside():
    text = speed_section(findings_of(final_of(speeds=(FOUND, FILES))))
    assert text.index("dense") < text.index("trial3")
    assert "× 1.50 ± 0.10" in text
    assert "gguf-f16" in text
    assert speed_section(findings_of(final_of())) == ""
    assert "which is not installed" in speed_section(findings_of(final_of(speeds=(FILES,))))


def test_the_leaderboard_has_columns_of_what_was_measured():
    assert report._speed_cells(final_of()) == {}
    assert report._speed_cells(final_of(speeds=(FILES,))) == {"file_bytes": 2**20}
    cells = report._speed_cells(final_of(speeds=(FOUND,)))
    assert tuple(cells) == report.SPEEDS
    assert (cells["peak_bytes"], cells["decode_rate"], cells["decode_gain"]) == (3 * 2**20, 30.0, 1.5)
    dense = report._dense_speed_cells([final_of(), final_of(speeds=(FILES, FOUND))])
    assert (dense["file_bytes"], dense["prefill_rate"], dense["prefill_gain"]) == (2**21, 20.0, 1.0)


def test_a_whole_run_tells_what_its_exports_take(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """A memory as budget, adapters beside and merged: from the study file to report, leaderboard, cards."""
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    asked = []

    def here(request):
        asked.append(request)
        return speed.measure(dataclasses.replace(request, threads=1, prompt=8, written=2))

    monkeypatch.setattr(speed, "_ask", here)
    recovery = {"type": "lora", "tokens": 512, "length": 64, "batch": 2, "corpus": "pydoc"}
    formats = [{"type": "hf", "adapters": "beside"}, "hf"]
    path = study_file(tmp_path, str(tiny_checkpoint), budget={"memory": 0.85}, trials=2, recipes="none",
                      finalize={"top": 1, "recovery": recovery, "formats": formats})  # fmt: skip
    run = tmp_path / "run"
    assert main(["run", str(path), "--out", str(run)]) == 0, capsys.readouterr().err
    (final,) = [final for final in read_finals(run) if final.role == "finalist"]
    assert [found.format for found in final.speeds] == ["hf", "adapters"]
    assert len(asked) == 3, "the dense model's memory is measured once"
    assert [request.dense is None for request in asked] == [True, False, False]
    names = [f"1-{final.name}", f"1-{final.name}.adapters"]
    for name in names:
        assert _card.SPEED in (run / "export" / name / "README.md").read_text()
        assert loading.verify(run / "export" / name, fresh=False).sound
    opened = [_verify.logits_of(loading.load(run / "export" / name)) for name in names]
    assert torch.equal(*opened)
    table = pd.read_csv(run / "leaderboard.csv").set_index("trial")
    best = table.loc[str(final.trial)]
    assert best["prefill_rate"] == pytest.approx(final.speeds[0].prefill.own, rel=1e-4)
    assert table.loc["dense", "decode_gain"] == 1.0
    assert 'id="speed"' in (run / "report.html").read_text()
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["budget"]["given"]["memory"] == 0.85
    assert manifest["budget"]["by_equal_ratios"]["remove"] > 0.1
    done = {r.number: r.result for r in records.read_records(run) if r.result and r.number != records.DENSE}
    assert all(0.7 < result.notes["memory_predicted"] <= 0.85 for result in done.values())
    count = len(asked)
    assert main(["run", str(path), "--out", str(run)]) == 0
    assert len(asked) == count, "a run that goes on measures nothing again"
