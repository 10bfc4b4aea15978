"""A tokenizer over a smaller vocabulary is the same tokenizer otherwise, also after it was saved and opened."""

import json

import pytest
import torch
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from adasearch import tokenization
from adasearch.errors import ModelError
from adasearch.pruning import vocabulary
from tests.tiny import tiny_config
from tests.vocabularies import LINES, opened, size, tokenizer_file

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
    "padding_side": "left",
    "truncation_side": "left",
    "model_max_length": 77,
    "chat_template": TEMPLATE,
}
TEXTS = [*LINES, "xylophone <|late|> zebra </s>", "新しい 🙂 naïve\n\n\t ok"]


def made(kind):
    """Tokenizers as users have them: of no class of its own, of Llama's and of Qwen2's."""
    data = tokenizer_file({"llama": "byte_fallback", "qwen": "byte_level"}.get(kind, kind))
    if kind == "llama":
        model = data["model"]
        return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], **SETTINGS)
    if kind == "qwen":
        model = data["model"]
        tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]], **SETTINGS)
        tokenizer.add_tokens(["<|late|>", "<|later|>"], special_tokens=True)
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=opened(data), extra_special_tokens=["</s>"], **SETTINGS)


def smaller(tokenizer, share=0.5):
    data = tokenization.tokenizer_json(tokenizer)
    ids = [i for line in LINES[:2] for i in tokenizer(line)["input_ids"]]
    must, rows = len(vocabulary.must_keep(data)), len(tokenizer)
    uses = vocabulary.counts(torch.tensor(ids), rows)
    kept = vocabulary.choose(uses, must + int(share * (rows - must)), data)
    return kept, tokenization.with_tokenizer_json(tokenizer, vocabulary.shrink(data, kept))


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "unigram", "llama", "qwen"])
def test_it_survives_saving(kind, tmp_path):
    old = made(kind)
    before = {text: old(text)["input_ids"] for text in TEXTS}
    kept, new = smaller(old)
    assert len(new) == len(kept) < len(old)
    new.save_pretrained(tmp_path / "new")
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    ids = vocabulary.new_ids(kept)
    for tokenizer in (new, again):
        assert type(tokenizer) is type(old)
        assert len(tokenizer) == len(kept)
        for text in TEXTS:
            found = tokenizer(text)["input_ids"]
            assert found == new(text)["input_ids"]
            assert max(found) < len(kept)
            for skip in (False, True):
                expected = old.decode(before[text], skip_special_tokens=skip)
                assert tokenizer.decode(found, skip_special_tokens=skip) == expected
            if all(i in ids for i in before[text]):
                assert found == [ids[i] for i in before[text]]
        for name in ("bos", "eos", "pad", "unk"):
            assert getattr(tokenizer, f"{name}_token") == SETTINGS[f"{name}_token"]
            assert getattr(tokenizer, f"{name}_token_id") == ids[getattr(old, f"{name}_token_id")]
        for name in ("padding_side", "truncation_side", "model_max_length", "chat_template"):
            assert getattr(tokenizer, name) == SETTINGS[name]
        assert tokenizer.all_special_ids == [ids[i] for i in old.all_special_ids]
        messages = [{"role": "user", "content": "the other"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>the other</s>"
        batch = tokenizer(["the", "the other thing"], padding=True)
        assert [len(row) for row in batch["input_ids"]] == [len(batch["input_ids"][1])] * 2
        assert batch["input_ids"][0][0] == tokenizer.pad_token_id
    assert {text: old(text)["input_ids"] for text in TEXTS} == before


def test_some_text_stays_as_it_was():
    """The comparison above is not empty: at 90 % the lines of the corpus keep all their tokens."""
    for kind in ("byte_level", "unigram", "llama", "qwen"):
        kept, _ = smaller(made(kind), 0.9)
        assert set(made(kind)(LINES[0])["input_ids"]) <= set(kept)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "qwen"])
def test_no_stale_file_is_written(kind, tmp_path):
    made(kind).save_pretrained(tmp_path / "old")
    kept, new = smaller(AutoTokenizer.from_pretrained(tmp_path / "old"))
    new.save_pretrained(tmp_path / "new")
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert size(json.loads((tmp_path / "new" / "tokenizer.json").read_text())) == len(kept)
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert not {"added_tokens_decoder", "vocab", "merges", "vocab_file", "tokenizer_file"} & config.keys()


def test_the_same_file_gives_the_same_tokenizer():
    old = made("llama")
    new = tokenization.with_tokenizer_json(old, tokenization.tokenizer_json(old))
    assert tokenization.tokenizer_json(new) == tokenization.tokenizer_json(old)
    assert [new(text) for text in TEXTS] == [old(text) for text in TEXTS]


def test_what_has_no_file_is_refused():
    for call in (tokenization.tokenizer_json, lambda t: tokenization.with_tokenizer_json(t, {})):
        with pytest.raises(ModelError, match=r"must be a fast one .* given ByT5Tokenizer"):
            call(ByT5Tokenizer())


def test_numbers_that_the_library_would_change_are_refused():
    old = made("byte_level")
    data = tokenization.tokenizer_json(old)
    data["added_tokens"][-1]["id"] += 1
    with pytest.raises(ModelError, match="'plain added' must have number"):
        tokenization.with_tokenizer_json(old, data)


NEW = {1: 0, 2: 1, 7: 2, 9: 3}


def test_configs_name_their_tokens_by_the_new_numbers():
    config = tiny_config(bos_token_id=1, eos_token_id=[2, 7], pad_token_id=None, vocab_size=50)
    changed = tokenization.config_with_vocabulary(config, NEW, 4)
    assert (changed.bos_token_id, changed.eos_token_id, changed.pad_token_id) == (0, [1, 2], None)
    assert (changed.vocab_size, changed.hidden_size) == (4, config.hidden_size)
    assert (config.bos_token_id, config.eos_token_id, config.vocab_size) == (1, [2, 7], 50)


def test_generation_configs_too():
    data = {"eos_token_id": [2, 9], "pad_token_id": -1, "bad_words_ids": [[1, 7], [9]], "top_k": 9, "do_sample": True}
    given = {**GenerationConfig().to_dict(), **data, "suppress_tokens": [7]}
    assert tokenization.named_ids(given) == {1, 2, 7, 9}
    changed = tokenization.remapped_ids(given, NEW)
    expected = {"eos_token_id": [1, 3], "bad_words_ids": [[0, 2], [3]], "suppress_tokens": [2]}
    assert changed == given | expected
    with pytest.raises(ModelError, match=r"token 5 must stay: the config names it \(1 in all\)"):
        tokenization.remapped_ids({"pad_token_id": 5}, NEW)
