"""Text of the dense model itself: drawn from its own distribution, by seed, made once."""

import dataclasses
import functools
import json

import pytest
import torch

from adasearch import data
from adasearch.errors import ConfigError, StorageError
from adasearch.sections import Sampling
from adasearch.tuning import generation
from tests import tiny
from tests.tuning.test_decoder import cut_model

START = 1
FEW = Sampling(length=16, documents=3)


@functools.cache
def model():
    return cut_model().eval()


def plainly(sampling, first, count):
    """Tokens drawn without a cache: the whole document is read for every token."""
    from adasearch.documents import fingerprint

    generator = torch.Generator().manual_seed(int(fingerprint((sampling.seed, first))[:15], 16))
    ids = torch.full((count, 1), START)
    with torch.no_grad():
        for _ in range(sampling.length):
            chances = (model()(input_ids=ids).logits[:, -1] / sampling.temperature).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids[:, 1:]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_are_drawn_from_the_model_as_without_a_cache(temperature):
    sampling = Sampling(length=16, temperature=temperature, seed=3)
    found = generation.sample(model(), START, sampling, 32, 5)
    assert found.shape == (5, 16)
    assert torch.equal(found, plainly(sampling, 32, 5))


def test_cold_text_is_greedy_and_warm_text_has_the_frequencies_of_the_model():
    greedy = torch.tensor([[START]])
    with torch.no_grad():
        for _ in range(16):
            greedy = torch.cat([greedy, model()(input_ids=greedy).logits[:, -1:].argmax(-1)], 1)
    cold = generation.sample(model(), START, Sampling(length=16, temperature=1e-4), 0, 2)
    assert cold.tolist() == [greedy[0, 1:].tolist()] * 2
    first = generation.sample(model(), START, Sampling(length=16), 0, 4000)[:, 0]
    with torch.no_grad():
        expected = model()(input_ids=torch.tensor([[START]])).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(first, minlength=tiny.VOCABULARY) / 4000
    assert (frequencies - expected).abs().max() < 4 * (expected.max() / 4000).sqrt()


def test_documents_follow_from_the_seed_and_are_nested():
    tokenizer = tiny.tiny_tokenizer()
    many = generation.documents(model(), tokenizer, Sampling(length=16, documents=40))
    assert len(many) == 40
    assert len(set(many)) > 30
    assert generation.documents(model(), tokenizer, Sampling(length=16, documents=33)) == many[:33]
    assert generation.documents(model(), tokenizer, Sampling(length=16, documents=40, seed=1)) != many


def test_a_text_is_made_once_and_again_where_its_file_is_damaged(tmp_path):
    made = []

    def make():
        made.append(1)
        return ["one text", "another\ntext", "a third"]

    path = generation.obtain(tmp_path / "generated", "model", FEW, make)
    assert generation.obtain(tmp_path / "generated", "model", FEW, make) == path
    assert len(made) == 1
    rows = [json.loads(line)["document"] for line in path.read_text().splitlines()]
    assert rows == ["one text", "another\ntext", "a third"]
    path.write_text(path.read_text()[:-20])
    assert generation.obtain(tmp_path / "generated", "model", FEW, make) == path
    assert len(made) == 2
    reseeded = dataclasses.replace(FEW, seed=1)
    others = [generation.obtain(tmp_path / "generated", *given, make) for given in (("other", FEW), ("m", reseeded))]
    assert len({path, *others}) == 3
    assert not list((tmp_path / "generated").glob("*.part"))


def test_short_documents_of_such_a_file_stay_apart(tmp_path):
    texts = [f"document {i}" for i in range(40)]
    path = generation.obtain(tmp_path, "model", Sampling(length=16, documents=40), lambda: texts)
    assert sorted(text for part in data.PARTS for text in data.documents(str(path), part)) == sorted(texts)


def test_the_oldest_texts_go_where_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_MAX_BYTES", 150)
    paths = [generation.obtain(tmp_path, str(i), FEW, lambda: ["x" * 10] * 3) for i in range(4)]
    assert paths[-1].is_file()
    assert not paths[0].is_file()


def test_what_the_model_cannot_make_is_refused(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    with pytest.raises(ConfigError, match="self:length must be below 512"):
        generation.documents(model(), tokenizer, Sampling(length=512))
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="with a bos or eos token to begin with"):
        generation.documents(model(), tokenizer, FEW)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="must be writable"):
        generation.obtain(tmp_path / "file", "model", FEW, list)
