"""A workbench's statistics: at hand, on disk, extended, and new where the text changed."""

import pytest
import torch

from adasearch import data
from adasearch.config import CalibrationConfig, UnitsConfig, study_from_dict
from adasearch.pruning import calibration
from adasearch.pruning.statistics import FAMILIES
from adasearch.workbench import Workbench
from tests.test_data import texts

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
    for known in (data.corpus_version, data._rows, data._documents):
        known.cache_clear()  # as in another process: one process reads a corpus once
    second = bench.statistics(bench.structure(), _sample(corpus, 2), UnitsConfig(), NEEDS)
    fresh = _fresh(bench, _sample(corpus, 2), NEEDS)
    for name, tensor in second.tensors.items():
        assert torch.equal(tensor, fresh.tensors[name])
    assert any(not torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
