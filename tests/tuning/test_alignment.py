"""Perplexity across vocabularies: the same text, cut at the same places, divided by the same number."""

import functools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from adasearch import tokenization
from adasearch.data import documents
from adasearch.errors import DataError
from adasearch.pruning import vocabulary
from adasearch.tuning import evaluation
from adasearch.tuning.alignment import align, aligned_perplexity, bits_per_byte
from tests.tuning import sample
from tests.vocabularies import opened

TEXT = "\n\n".join(documents("pydoc", "report")[:12]) + "\n — naïve 東京 🙂🙂 and so on"


def ids(tokenizer, text=TEXT):
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@functools.cache
def smaller(rows=400):
    old = sample.tokenizer()
    data = tokenization.tokenizer_json(old)
    uses = vocabulary.counts(ids(old, "\n\n".join(documents("pydoc", "fit")[:40])), 600)
    return tokenization.with_tokenizer_json(old, vocabulary.shrink(data, vocabulary.choose(uses, rows, data)))


@pytest.mark.parametrize("window", [2, 7, 64])
def test_the_reference_itself_gives_the_present_figure(window):
    """To the last bit, with characters of several tokens at borders of windows and with a limit."""
    tokenizer, model = sample.tokenizer(), sample.model()
    aligned = align(TEXT, tokenizer, tokenizer, window)
    tokens = ids(tokenizer)
    count = len(tokens) // window
    assert torch.equal(aligned.tokens, tokens[: count * window].view(count, window))
    assert aligned.scored[:, 1:].all()
    assert not aligned.scored[:, 0].any()
    assert aligned_perplexity(model, aligned) == evaluation.perplexity(model, tokens, window)
    part = align(TEXT, tokenizer, tokenizer, window, limit=130)
    assert aligned_perplexity(model, part) == evaluation.perplexity(model, tokens[:130], window)


@given(st.integers(2, 90), st.sampled_from([262, 400, 570]), st.text(min_size=100, max_size=150))
def test_windows_hold_the_tokens_of_the_text_in_their_order(window, rows, noise):
    old, new = sample.tokenizer(), smaller(rows)
    text = TEXT[:700] + noise + TEXT[-300:]
    aligned = align(text, old, new, window)
    assert aligned.reference == len(ids(old, text)) // window * (window - 1)
    assert not aligned.scored[:, 0].any()
    left = ids(new, text).tolist()
    for line, scored in zip(aligned.tokens.tolist(), aligned.scored.tolist(), strict=True):
        end = sum(token != 0 for token in line)  # 0 is <pad>, which no text holds
        begin = scored.index(True) if True in scored else end
        assert all(scored[begin:end])
        assert not any(scored[end:])
        assert line[:end] == left[:end]
        left = left[end:]


def test_what_is_predicted_is_the_text_of_the_reference():
    """Window by window, where no token of the new tokenizer crosses the border."""
    old, new, window = sample.tokenizer(), smaller(), 16
    aligned, tokens = align(TEXT, old, new, window), ids(old)
    same = 0
    for k, (line, scored) in enumerate(zip(aligned.tokens, aligned.scored, strict=True)):
        expected = old.decode(tokens[k * window + 1 : (k + 1) * window])
        same += new.decode(line[scored]) == expected
    assert same / len(aligned.tokens) > 0.9
    assert aligned.scored.sum() > aligned.reference  # in more tokens
    first = align("plain words only here", old, old, 4)
    count = len(ids(old, "plain words only here")) // 4
    predicted = [ids(old, "plain words only here")[k * 4 + 1 : k * 4 + 4] for k in range(count)]
    assert first.size == sum(len(old.decode(p).encode()) for p in predicted)


def test_the_figure_is_the_cost_of_the_text_over_tokens_of_the_reference():
    """Against the definition, window by window without padding."""
    old, new, model, window = sample.tokenizer(), smaller(), sample.model(), 32
    aligned = align(TEXT, old, new, window)
    widths = aligned.scored.long().cumsum(1).argmax(1) + 1
    nats = 0.0
    for line, scored, width in zip(aligned.tokens, aligned.scored, widths.tolist(), strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=line[None, :width]).logits[0].double().log_softmax(-1)
        nats -= sum(float(logprobs[t - 1, line[t]]) for t in range(1, width) if scored[t])
    found = aligned_perplexity(model, aligned)
    assert found == pytest.approx(math.exp(nats / aligned.reference), rel=1e-5)
    assert aligned_perplexity(model, aligned, token_budget=40) == pytest.approx(found, rel=1e-5)
    assert bits_per_byte(found, aligned) == pytest.approx(nats / math.log(2) / aligned.size, rel=1e-5)


def test_one_more_piece_costs_what_it_adds():
    """A model that gives every token 1/600: nats count pieces, and the reference stays what it was."""
    old, new, model = sample.tokenizer(), smaller(), sample.model(seed=5)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    aligned = align(TEXT, old, new, 32)
    expected = 600 ** (int(aligned.scored.sum()) / aligned.reference)
    assert aligned_perplexity(model, aligned) == pytest.approx(expected, rel=1e-4)
    sample.model.cache_clear()


def test_a_token_over_a_border_stays_with_its_window():
    """Reference ab cd|ef ab|cd ef, other a bcde|f a bcde|f: the last window has nothing left but what is given."""
    core = json.loads(sample.tokenizer().backend_tokenizer.to_str())

    def split(pieces, merges):
        vocab = {piece: i for i, piece in enumerate([*"abcdef", *pieces])}
        model = core["model"] | {"vocab": vocab, "merges": merges}
        return PreTrainedTokenizerFast(tokenizer_object=opened(core | {"model": model, "added_tokens": []}))

    old = split(["ab", "cd", "ef"], [["a", "b"], ["c", "d"], ["e", "f"]])
    new = split(["bc", "de", "bcde"], [["b", "c"], ["d", "e"], ["bc", "de"]])
    aligned = align("abcdefabcdef", old, new, 2)
    assert ids(old, "abcdefabcdef").tolist() == [6, 7, 8, 6, 7, 8]
    assert aligned.tokens.tolist() == [[0, 8, 0], [5, 0, 8], [5, 0, 0]]
    assert aligned.scored.tolist() == [[False, True, False], [False, True, True], [False, False, False]]
    assert (aligned.reference, aligned.size) == (3, 6)


def test_short_text_is_refused():
    for window in (1, 64):
        with pytest.raises(DataError, match=f"given {window} and"):
            align("short", sample.tokenizer(), smaller(), window)
