"""What a recovery reads: mixtures in their weights, packed documents, conversations with their answers."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch import data
from adasearch.chat import Conversation, Turn, conversation, write
from adasearch.corpora import check_corpus, parse_corpus, scored_corpus
from adasearch.errors import ConfigError, DataError
from adasearch.sections import Mix, MixPart, Sampling
from adasearch.streams import Reading, one_pass, training_text
from tests import tiny
from tests.test_data import TOKENIZER, repository, texts
from tests.tuning import sample

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EOS = TOKENIZER.eos_token_id


def chatty(template=TEMPLATE):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def reading(*parts, **changes):
    parts = parts or (("pydoc", 1.0),)
    mix = Mix(mix=tuple(MixPart(corpus=corpus, weight=weight) for corpus, weight in parts))
    return Reading(**{"text": mix, "tokens": 2000, "length": 64, "seed": 1, **changes})


def lines(folder, name, letter, count=40, words=30):
    path = folder / f"{name}.jsonl"
    rows = [{"document": " ".join(f"{letter}{i}x{j}" for j in range(words))} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(folder, name="talks.jsonl", count=40):
    rows = [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": f"say {i} " * 3},
                      {"role": "user", "content": "and?"}, {"role": "assistant", "content": f"more {i}"}]}
        for i in range(count)
    ]  # fmt: skip
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"chat/{folder / name}"


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 2, 1)])
def test_shares_of_a_mixture_are_its_weights_in_tokens(tmp_path, weights, packing):
    # documents of very different lengths: shares in documents would be far off
    paths = [lines(tmp_path, name, name, words=words) for name, words in (("a", 5), ("b", 40), ("c", 12))]
    asked = reading(*zip(paths, weights, strict=True), tokens=20_000, packing=packing)
    found = training_text(TOKENIZER, asked)
    for share, weight in zip(found.shares, weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), abs=0.02)
    text = TOKENIZER.decode(found.tokens).replace("<eos>", " ")
    sizes = [sum(len(word) + 1 for word in text.split() if word.startswith(letter)) for letter in "abc"]
    assert [size / sum(sizes) for size in sizes] == pytest.approx(
        [w / sum(weights) for w in weights], abs=0.05
    )  # without eos


@given(st.integers(0, 3), st.sampled_from(["stream", "documents"]))
def test_a_text_follows_from_its_seed(tmp_path_factory, seed, packing):
    folder = tmp_path_factory.mktemp("mix")
    parts = [(lines(folder, name, name), weight) for name, weight in (("a", 2.0), ("b", 1.0))]
    one, again, other = (
        training_text(TOKENIZER, reading(*parts, seed=s, packing=packing)).tokens for s in (seed, seed, seed + 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_the_stream_of_one_corpus_goes_round_and_says_how_often(tmp_path):
    root = repository(tmp_path, rows=texts(10, words=60))
    once = sum(len(text) + 1 for text in data.documents("owner/texts", "fit", root))
    found = training_text(TOKENIZER, reading(("owner/texts", 1.0), tokens=int(2.5 * once)), root)
    assert found.tokens.shape == (int(2.5 * once),)
    assert found.marks is None
    assert found.shares == ()
    assert 2.5 <= found.epochs <= 3.0
    assert int((found.tokens == EOS).sum()) >= 2


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_one_pass_ends_before_documents_come_again(tmp_path, packing):
    corpus = lines(tmp_path, "a", "a", words=6)
    found = training_text(TOKENIZER, reading((corpus, 1.0), tokens=10_000, length=48, packing=packing))
    once = one_pass(found, 48)
    assert found.epochs > 2
    assert len(once.tokens) % 48 == 0
    assert len(found.tokens) / found.epochs - 48 <= len(once.tokens) <= len(found.tokens) / found.epochs
    assert once.marks is None or len(once.marks.segments) == len(once.marks.counted) == len(once.tokens)
    seen = TOKENIZER.decode(once.tokens).replace("<eos>", " ").split()
    firsts = [seen.count(f"a{i}x0") for i in range(40)]
    assert sum(firsts) > 5
    assert sum(count > 1 for count in firsts) <= (0 if packing == "stream" else 2)
    assert len(one_pass(found, 10_000).tokens) == 10_000, "one sequence at least"


def pieces(found, length):
    """Token lists of the documents in each sequence, fillers left out."""
    rows = []
    for ids, segments, counted in zip(
        found.tokens.view(-1, length), found.marks.segments.view(-1, length), found.marks.counted.view(-1, length),
        strict=True,
    ):  # fmt: skip
        parts = [ids[segments == segment] for segment in segments.unique()]
        kept = [counted[segments == segment].any() for segment in segments.unique()]
        rows.append([part.tolist() for part, keep in zip(parts, kept, strict=True) if keep])
    return rows


@pytest.mark.parametrize("length", [64, 200, 1000])
def test_packed_documents_stay_whole_where_they_fit(tmp_path, length):
    corpus = lines(tmp_path, "a", "a", count=60, words=20)
    found = training_text(TOKENIZER, reading((corpus, 1.0), tokens=6000, length=length, packing="documents"))
    assert len(found.tokens) == -(-6000 // length) * length
    whole = {(*TOKENIZER(text)["input_ids"], EOS) for text in data.documents(corpus, "fit")}
    cut = {text[begin : begin + length] for text in whole for begin in range(0, len(text), length)}
    rows = pieces(found, length)
    assert all(tuple(piece) in cut for row in rows for piece in row)
    assert length < 120 or all(tuple(piece) in whole for row in rows for piece in row)
    filled = sum(len(piece) for row in rows for piece in row) / len(found.tokens)
    assert filled > 0.6


def test_sequences_of_a_row_never_mix_their_documents(tmp_path):
    found = training_text(TOKENIZER, reading((lines(tmp_path, "a", "a", words=9), 1.0), packing="documents"))
    for segments in found.marks.segments.view(-1, 64):
        assert (segments[1:] - segments[:-1]).min() >= 0
        assert (segments[1:] - segments[:-1]).max() <= 1


def test_too_little_text_is_an_error(tmp_path):
    corpus = lines(tmp_path, "a", "a", count=4, words=3)
    held = sum(len(text) for text in data.documents(corpus, "fit"))
    with pytest.raises(DataError, match=f"holds {held} tokens that may be read, a sequence needs 640"):
        training_text(TOKENIZER, reading((corpus, 1.0), tokens=5000, length=640))
    with pytest.raises(DataError, match="must hold a document that may be read"):
        training_text(TOKENIZER, reading(), guard=lambda text: True)


def test_what_the_guard_takes_is_not_read(tmp_path):
    corpus = lines(tmp_path, "a", "a")
    gone = data.documents(corpus, "fit")[::2]
    for packing in ("stream", "documents"):
        text = TOKENIZER.decode(training_text(TOKENIZER, reading((corpus, 1.0), packing=packing),
                                              guard=lambda found: found in gone).tokens)  # fmt: skip
        assert not any(document.split()[0] in text.replace("<eos>", " ").split() for document in gone)


# --- conversations


@pytest.mark.parametrize(("row", "turns"), [
    ({"instruction": "Do", "input": "this", "output": "done"}, [("user", "Do\n\nthis"), ("assistant", "done")]),
    ({"instruction": "Do", "input": "", "output": "done"}, [("user", "Do"), ("assistant", "done")]),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
     [("system", "s"), ("user", "u")]),
    ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
     [("user", "u"), ("assistant", "a")]),
    ({"prompt": "u", "completion": "a"}, [("user", "u"), ("assistant", "a")]),
])  # fmt: skip
def test_rows_of_instruction_data_are_conversations(row, turns):
    assert list(conversation(row, "c").turns) == [Turn(*turn) for turn in turns]
    assert all(text in conversation(row, "c").text for _, said in turns for text in said.split("\n\n"))


def test_other_rows_are_none_and_broken_ones_are_told():
    assert conversation({"text": "plain"}, "c") is None
    with pytest.raises(DataError, match="each message must have the texts role and content"):
        conversation({"messages": [{"role": "user"}]}, "c")


def test_answers_are_what_the_template_adds_to_an_opened_conversation():
    tokenizer = chatty()
    turns = (Turn("user", "ask"), Turn("assistant", "yes"), Turn("user", "so?"), Turn("assistant", "no"))
    ids, answers = write(tokenizer, turns, "c")
    assert tokenizer.decode(ids) == "<user>ask<end><assistant>yes<end><user>so?<end><assistant>no<end>"
    assert tokenizer.decode([token for token, own in zip(ids, answers, strict=True) if own]) == "yes<end>no<end>"
    unanswered = write(tokenizer, turns[:3], "c")
    assert tokenizer.decode(unanswered.ids).endswith("<user>so?<end>")
    assert sum(unanswered.answers) == len("yes<end>")


def test_a_template_that_states_the_date_writes_the_same_on_every_day():
    dated = chatty("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + TEMPLATE)
    ids, _ = write(dated, (Turn("user", "ask"), Turn("assistant", "yes")), "c")
    assert dated.decode(ids).startswith("26 Jul 2024")


def test_templates_that_are_missing_refuse_or_rewrite_are_told(tmp_path):
    corpus = talks(tmp_path)
    with pytest.raises(DataError, match="needs a chat template, and the model's tokenizer has none"):
        training_text(TOKENIZER, reading((corpus, 1.0)))
    refusing = chatty("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses a conversation: roles must alternate"):
        training_text(refusing, reading((corpus, 1.0)))
    rewriting = chatty("{{ messages | length }}" + TEMPLATE)
    with pytest.raises(DataError, match="rewrites earlier turns"):
        training_text(rewriting, reading((corpus, 1.0)))


def test_only_answers_count_where_that_is_asked_for(tmp_path):
    tokenizer, corpus = chatty(), talks(tmp_path)
    plain = lines(tmp_path, "a", "a", words=6)
    asked = reading((corpus, 1.0), (plain, 1.0), packing="documents", loss="answers", length=150)
    found = training_text(tokenizer, asked)
    counted = tokenizer.decode(found.tokens[found.marks.counted])
    assert "say" in counted
    assert "more" in counted
    assert "ask" not in counted
    assert "and?" not in counted
    assert "a1x1" in counted  # plain text counts whole
    everything = training_text(tokenizer, reading((corpus, 1.0), packing="documents", length=150))
    assert "<user>ask" in tokenizer.decode(everything.tokens[everything.marks.counted])
    assert found.marks.counted.view(-1, 150).any(1).all()


def test_a_conversation_lies_where_its_plain_text_does(tmp_path):
    corpus = talks(tmp_path)
    for part in data.PARTS:
        assert data.documents(corpus, part) == data.documents(corpus.removeprefix("chat/"), part)
    assert all(isinstance(talk, Conversation) for talk in data._talks(parse_corpus(corpus), "fit"))


def test_rows_that_are_no_conversations_say_what_they_are(tmp_path):
    with pytest.raises(DataError, match=r"rows must be conversations \(instruction \+ output.*they have document"):
        training_text(chatty(), reading((f"chat/{lines(tmp_path, 'a', 'a')}", 1.0)))


# --- specs


def test_specs_of_own_text_and_chat():
    assert parse_corpus("self").kind == "generated"
    assert parse_corpus("chat/owner/name:config:split").chat
    assert parse_corpus("chat/owner/name:config:split").plain == parse_corpus("owner/name:config:split")
    from adasearch.corpora import sampling

    assert sampling("pydoc") is None
    assert sampling("self:temperature=0.5:length=64:documents=9:seed=2") == Sampling(
        temperature=0.5, length=64, documents=9, seed=2
    )


@pytest.mark.parametrize(("spec", "where", "words"), [
    ("self:temprature=1", "key.temprature", "did you mean 'temperature'"),
    ("self:temperature=0", "key.temperature", "greater than 0"),
    ("self:length=5", "key.length", "greater than or equal to 16"),
    ("self:documents=many", "key.documents", "integer"),
    ("chat/pydoc", "key", "before a repository or a file with rows"),
    ("chat/self", "key", "before a repository or a file with rows"),
])  # fmt: skip
def test_bad_specs_are_refused_with_their_key(spec, where, words):
    with pytest.raises(ConfigError) as caught:
        check_corpus(spec, None, "key")
    assert caught.value.where == where
    assert words in str(caught.value)


@pytest.mark.parametrize("spec", ["self", "chat/owner/name"])
def test_what_is_scored_is_text_as_it_was_written(spec):
    with pytest.raises(ConfigError, match=r"report\.perplexity: must be text as it was written"):
        scored_corpus(spec, None, "report.perplexity")


def test_real_instruction_data_is_read_with_a_template():
    root, tokenizer = sample.data_root(), chatty()
    spec = "chat/yahma/alpaca-cleaned:demo"
    check_corpus(spec, root, "key")
    asked = reading((spec, 1.0), tokens=20_000, length=1000, packing="documents", loss="answers")
    found = training_text(tokenizer, asked, root)
    written, counted = (tokenizer.decode(ids) for ids in (found.tokens, found.tokens[found.marks.counted]))
    assert written.count("<assistant>") > 15
    assert "<assistant>" not in counted
    assert "<user>" not in counted
    assert 0.2 < len(counted) / len(written) < 0.95
