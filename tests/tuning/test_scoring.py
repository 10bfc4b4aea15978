"""Packed rows give what each choice gives alone, in any order and batch; tokens are cut where lm-eval cuts them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasearch.errors import DataError, TrialError
from adasearch.pruning import surgery
from adasearch.tuning import scoring
from adasearch.tuning.items import Draw, Item
from adasearch.tuning.tasks import load_items
from tests import tiny
from tests.tuning import sample

CLOZE = load_items("cloze/pydoc", "search", Draw(seed=1, search=12, select=6))


def item(contexts, choices, gold=0):
    return Item(
        task="made",
        id="0",
        contexts=tuple(contexts),
        choices=tuple(choices),
        gold=gold,
        lengths=tuple(map(len, choices)),
    )


SHAPES = {
    "cloze": CLOZE[0],
    "one token each": item(["Is it so?"], ["A", "B", "C"]),
    "equal choices": item(["A value"], [" is given", " is given"]),
    "one choice begins another": item(["A value"], [" is", " is given here"]),
    "contexts differ": item(["The value was", "The values were many and"], [" returned.", " returned."]),
    "nothing shared": item(["One", "another"], [" thing", " thing"]),
    "no context": item([""], ["The value", " is returned"]),
}


def encoded(items, limit=512, **options):
    return scoring.encode(items, sample.tokenizer(**options), limit)


def reference(model, one):
    """Sum the log-probabilities of each choice's tokens from a plain forward pass over the whole sequence."""
    result = []
    for branch, count in zip(one.branches, one.scored, strict=True):
        ids = torch.tensor(np.concatenate((one.prefix, branch))[None], dtype=torch.long)
        with torch.no_grad():
            logprobs = model(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)
        result.append(float(logprobs[-count:][torch.arange(count), ids[0, -count:]].sum()))
    return result


def check(model, items, tolerance=1e-4, **options):
    found = scoring.score(model, items, **options)
    for one, logliks in zip(items, found.logliks, strict=True):
        assert np.allclose(logliks, reference(model, one), atol=tolerance, rtol=0)
        assert logliks.dtype == np.float64


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_scores_are_those_of_plain_sequences(family, packed):
    check(sample.model(family), encoded([*SHAPES.values(), *CLOZE[:4]]), packed=packed)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_item_alone(name):
    check(sample.model(), encoded([SHAPES[name]]))


def test_eager_attention_takes_the_same_mask():
    model = sample.model(seed=1)
    before = scoring.score(model, encoded(CLOZE[:3])).logliks
    model.set_attn_implementation("eager")
    try:
        after = scoring.score(model, encoded(CLOZE[:3])).logliks
    finally:
        model.set_attn_implementation("sdpa")
    assert np.allclose(np.concatenate(before), np.concatenate(after), atol=1e-4)


@settings(max_examples=8)
@given(st.permutations(range(len(CLOZE))), st.integers(1, 4000))
def test_order_and_batch_size_change_nothing(order, budget):
    items = encoded([CLOZE[i] for i in order])
    straight = scoring.score(sample.model(), encoded(CLOZE)).logliks
    found = scoring.score(sample.model(), items, token_budget=budget).logliks
    for place, index in enumerate(order):
        assert np.allclose(found[place], straight[index], atol=1e-4)


def test_pruned_models_of_uneven_widths_are_scored():
    config = tiny.tiny_config(vocab_size=600)
    structure, units = tiny.tiny_structure(config)
    widths = {g.name: max(1, g.width - 1 - g.layer) for g in structure.groups}
    plan = tiny.random_plan(structure, units, widths)
    check(surgery.cut(config, tiny.tiny_weights(config), structure, plan), encoded(list(SHAPES.values())))


def test_shared_tokens_are_read_once():
    one = encoded([CLOZE[0]])[0]
    apart = sum(len(one.prefix) + len(branch) - 1 for branch in one.branches)
    assert one.tokens == apart - 3 * len(one.prefix)
    assert len(one.prefix) > 50
    assert encoded([SHAPES["one token each"]])[0].tokens == len(encoded([SHAPES["one token each"]])[0].prefix)


def test_long_contexts_lose_their_beginning():
    long = item(["word " * 100 + "end"], [" of the text", " of"])
    one = encoded([long], limit=30)[0]
    whole = encoded([long], limit=512)[0]
    for branch, full in zip(one.branches, whole.branches, strict=True):
        sequence = np.concatenate((one.prefix, branch))
        assert sequence.tolist() == np.concatenate((whole.prefix, full))[-len(sequence) :].tolist()
        assert len(sequence) <= 31
    check(sample.model(), [one])


def test_trailing_spaces_go_to_the_choice():
    spaced, plain = encoded([item(["A value "], ["is", "was"])])[0], encoded([item(["A value"], [" is", " was"])])[0]
    assert spaced.prefix.tolist() == plain.prefix.tolist()
    assert spaced.scored == plain.scored


@pytest.mark.parametrize("bos", [False, True])
def test_an_empty_context_is_the_prefix_token(bos):
    one = encoded([item([""], ["A", "B"])], bos=bos)[0]
    assert one.prefix.tolist() == [1]
    written = encoded([item(["<bos>It"], [" is"])], bos=True)[0]
    assert np.concatenate((written.prefix, written.branches[0])).tolist().count(1) == 1


def test_choices_without_tokens_are_refused():
    with pytest.raises(DataError, match="between 1 and 512 tokens, it has 0"):
        encoded([item(["text"], ["", " x"])])
    with pytest.raises(DataError, match="between 1 and 8 tokens"):
        encoded([item(["text"], [" many words are in this choice and more " * 3])], limit=8)


def test_values_that_are_not_finite_fail_the_trial():
    model = sample.model(seed=2)
    with torch.no_grad():
        saved = model.model.norm.weight.clone()
        model.model.norm.weight.fill_(math.nan)
    try:
        with pytest.raises(TrialError, match="not finite") as caught:
            scoring.score(model, encoded(CLOZE[:2]))
    finally:
        with torch.no_grad():
            model.model.norm.weight.copy_(saved)
    assert (caught.value.kind, caught.value.phase) == ("nan", "evaluate")


def test_models_that_take_no_mask_are_scored_choice_by_choice():
    windowed = sample.model("mistral", sliding_window=16, seed=3)
    items = encoded(CLOZE[:3])
    assert not scoring.takes_packed(windowed, items)
    check(windowed, items)
    assert scoring.takes_packed(sample.model(), items)
    assert scoring.path_difference(sample.model(), items) < 1e-4


def test_bfloat16_scores_are_near():
    model = sample.model(seed=4)
    exact = np.concatenate(scoring.score(model, encoded(CLOZE[:4])).logliks)
    near = np.concatenate(scoring.score(model.to(torch.bfloat16), encoded(CLOZE[:4])).logliks)
    model.float()
    assert np.abs(exact - near).max() < 0.05 * np.abs(exact).max()


def test_max_length_is_found_where_lm_eval_looks():
    assert scoring.max_length(tiny.tiny_config(), tiny.tiny_tokenizer()) == 512
    assert scoring.max_length(SimpleNamespace(), tiny.tiny_tokenizer()) == 2048
