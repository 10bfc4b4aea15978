"""A workbench's statistics: at hand, on disk, extended, and new where the text changed."""

import dataclasses
import json

import pytest
import torch

from adasearch import corpora, data
from adasearch.config import component, study_from_dict
from adasearch.errors import TrialError
from adasearch.pruning import calibration
from adasearch.pruning.statistics import FAMILIES
from adasearch.registry import RECOVERY
from adasearch.sections import CalibrationConfig, UnitsConfig
from adasearch.trial import run_trial
from adasearch.tuning import generation, tasks
from adasearch.workbench import Workbench
from tests.test_data import texts
from tests.test_streams import lines

NEEDS = frozenset({"moments", "gradient"})


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(texts(12)))
    return file


@pytest.fixture
def bench(tiny_checkpoint, tmp_path, corpus):
    study = {
        "name": "s",
        "model": {"name": str(tiny_checkpoint), "dtype": "float32"},
        "space": {"importance": {"choice": ["taylor"]}},
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 4},
        "report": {"tasks": ["cloze/pydoc"]},
        "trial": {"calibration": {"corpus": str(corpus), "samples": 2, "length": 16}},
    }
    return Workbench(study_from_dict(study, "study:", tmp_path / "study.yaml"), tmp_path / "run", threads=1)


def _sample(corpus, samples):
    return CalibrationConfig(corpus=str(corpus), samples=samples, length=16)


def _fresh(bench, sample, needs):
    tokens = data.token_matrix(bench.base.tokenizer, sample)
    return calibration.collect(bench.dense(), bench.structure(), tokens, needs)


def test_equal_to_fresh_whether_computed_read_or_extended(bench, corpus, monkeypatch):
    parts = []
    plain = calibration.accumulate

    def watched(model, structure, tokens, families):
        parts.append(len(tokens))
        return plain(model, structure, tokens, families)

    monkeypatch.setattr(calibration, "accumulate", watched)
    for samples in (3, 3, 8, 3):
        found = bench.statistics(bench.structure(), _sample(corpus, samples), UnitsConfig(), FAMILIES)
        monkeypatch.undo()
        fresh = _fresh(bench, _sample(corpus, samples), FAMILIES)
        monkeypatch.setattr(calibration, "accumulate", watched)
        for name, tensor in fresh.tensors.items():
            close = 1e-6 * float(tensor.abs().max())
            torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-6, atol=close)
    assert parts == [3, 5]


def test_what_the_last_trial_used_is_at_hand(bench, corpus):
    first = bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), NEEDS)
    assert bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), NEEDS) is first
    assert bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), frozenset()) is None
    other = bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), frozenset({"moments"}))
    assert other.families == {"moments"}


def test_another_text_gives_other_statistics(bench, corpus):
    first = bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), NEEDS)
    corpus.write_text("\n\n".join(texts(12, words=70)).upper())
    for known in (corpora.corpus_version, data._rows, data._documents):
        known.cache_clear()  # as in another process: one process reads a corpus once
    second = bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), NEEDS)
    fresh = _fresh(bench, _sample(corpus, 2), NEEDS)
    for name, tensor in second.tensors.items():
        assert torch.equal(tensor, fresh.tensors[name])
    assert any(not torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


# --- recovery text and what must not stand in it


def _study(checkpoint, folder, corpus, **changes):
    study = {
        "name": "s",
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "space": {"importance": {"choice": ["taylor"]}},
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 4},
        "report": {"tasks": ["cloze/pydoc"], "items": 30},
        "trial": {
            "calibration": {"corpus": str(corpus), "samples": 2, "length": 16},
            "recovery": {"type": "lora", "tokens": 256, "length": 32, "batch": 2},
        },
        **changes,
    }
    return study_from_dict(study, "study:", folder / "study.yaml")


@pytest.fixture
def dirty(tiny_checkpoint, tmp_path):
    """A corpus of clean documents and of some in which report items of cloze/pydoc stand, and those."""
    study = _study(tiny_checkpoint, tmp_path, "pydoc")
    items = tasks.study_items(study, "report")["cloze/pydoc"]
    planted = [f"{i} before. {''.join(item.pairs()[item.gold])} after." for i, item in enumerate(items[:10])]
    file = tmp_path / "dirty.jsonl"
    file.write_text("".join(json.dumps({"document": text}) + "\n" for text in [*texts(30, words=40), *planted]))
    return str(file), [text for text in data.documents(str(file), "fit") if text in planted]


def _bench(checkpoint, folder, corpus, mode="drop", **changes):
    report = {"tasks": ["cloze/pydoc"], "items": 30, "contamination": mode}
    return Workbench(_study(checkpoint, folder, corpus, report=report, **changes), folder / "run", threads=1)


def test_documents_with_report_items_are_left_out_and_counted(tiny_checkpoint, tmp_path, dirty):
    corpus, planted = dirty
    assert 0 < len(planted) < 10
    bench = _bench(tiny_checkpoint, tmp_path, corpus)
    recovery = component(RECOVERY, {**bench.study.trial["recovery"], "tokens": 40_000}, "recovery")
    text = bench.recovery_text(recovery, corpus, 0)
    assert text.dropped == len(planted)
    written = bench.base.tokenizer.decode(text.tokens)
    assert not any(document[:60] in written for document in planted)
    sample = dataclasses.replace(_sample(corpus, 2), samples=400)
    tokens = bench.sample_tokens(sample)
    assert bench.sample_dropped(sample) == len(planted)
    assert not any(bench.base.tokenizer.decode(row) in document for row in tokens for document in planted)
    allowing = _bench(tiny_checkpoint, tmp_path, corpus, "allow")
    free = allowing.recovery_text(recovery, corpus, 0)
    assert free.dropped == allowing.sample_dropped(sample) == 0
    assert any(document[:60] in bench.base.tokenizer.decode(free.tokens) for document in planted)


def test_what_may_be_read_decides_which_statistics_are_the_same(tiny_checkpoint, tmp_path, dirty):
    corpus, _ = dirty
    dropping, allowing = (_bench(tiny_checkpoint, tmp_path, corpus, mode) for mode in ("drop", "allow"))
    sample = dataclasses.replace(_sample(corpus, 2), samples=60)
    one, other = (b.statistics(b.structure(), sample, UnitsConfig(), NEEDS) for b in (dropping, allowing))
    assert any(not torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert dropping.sample_key(sample) != allowing.sample_key(sample)


def test_a_trial_notes_what_was_left_out(tiny_checkpoint, tmp_path, dirty):
    corpus, planted = dirty
    bench = _bench(tiny_checkpoint, tmp_path, corpus)
    config = {**bench.study.trial, "importance": "taylor"}
    config["recovery"] = {**config["recovery"], "tokens": 20_000, "batch": 64, "length": 64}
    config["calibration"] = {**config["calibration"], "samples": 300}
    result, _ = run_trial(config, bench)
    assert result.notes["recovery_dropped"] == len(planted)
    assert result.notes["calibration_dropped"] == len(planted)


def test_refused_text_fails_the_trial_that_reads_it(tiny_checkpoint, tmp_path, dirty):
    corpus, _ = dirty
    bench = _bench(tiny_checkpoint, tmp_path, corpus, "refuse")
    recovery = component(RECOVERY, {**bench.study.trial["recovery"], "tokens": 40_000}, "recovery")
    with pytest.raises(TrialError, match="stands in text that is to be read") as caught:
        bench.recovery_text(recovery, corpus, 0)
    assert (caught.value.kind, caught.value.phase) == ("config", "recover")


def test_the_dense_model_makes_text_once_for_all(tiny_checkpoint, tmp_path, monkeypatch):
    made = []
    plain = generation.documents
    monkeypatch.setattr(generation, "documents", lambda *given: made.append(1) or plain(*given))
    bench = _bench(tiny_checkpoint, tmp_path, "self:length=32:documents=64")
    recovery = component(RECOVERY, {"type": "full", "tokens": 512, "length": 32, "batch": 2,
                                    "packing": "documents"}, "recovery")  # fmt: skip
    mix = {"mix": [{"corpus": "self:length=32:documents=64", "weight": 1}, {"corpus": "pydoc", "weight": 1}]}
    mixed = component(RECOVERY, {"type": "lora", "tokens": 20_000, "corpus": mix}, "recovery")
    corpus = bench.study.calibration_corpora[0]
    text = bench.recovery_text(recovery, corpus, 0)
    assert text.tokens.shape == (512,)
    assert text.marks is not None
    assert bench.recovery_text(mixed, corpus, 0).shares == pytest.approx((0.5, 0.5), abs=0.05)
    sample = CalibrationConfig(corpus=corpus, samples=4, length=16)
    assert bench.sample_tokens(sample).shape == (4, 16)
    assert bench.statistics(bench.structure(), sample, UnitsConfig(), NEEDS).families == NEEDS
    again = _bench(tiny_checkpoint, tmp_path, corpus)
    assert torch.equal(again.recovery_text(recovery, corpus, 0).tokens, text.tokens)
    assert len(made) == 1
    bench.assert_unchanged()


def test_a_corpus_with_too_little_text_fails_the_trial_by_its_key(tiny_checkpoint, tmp_path):
    small = lines(tmp_path, "small", "a", count=8, words=3)
    bench = _bench(tiny_checkpoint, tmp_path, "pydoc")
    recovery = component(RECOVERY, {"type": "full", "corpus": small}, "recovery")
    with pytest.raises(TrialError, match=r"recovery\.corpus: corpus .*a sequence needs 256"):
        bench.recovery_text(recovery, "pydoc", 0)
