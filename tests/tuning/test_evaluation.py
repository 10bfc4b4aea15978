"""Scores and their standard errors against values worked out by hand; perplexity against the definition."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.config import TaskScore, mean_of
from adasearch.errors import DataError, TrialError
from adasearch.sections import Metric
from adasearch.tuning import evaluation
from adasearch.tuning.items import Item
from tests.tuning import sample


def item(gold=0, lengths=(4, 2), contexts=("c",), choices=(" four", " tw"), acc_norm=True):
    return Item(task="made", id="0", contexts=contexts, choices=choices, gold=gold, lengths=lengths, acc_norm=acc_norm)


LOGLIKS = np.array([-4.0, -3.0])  # per character -1.0 and -1.5


def test_accuracies_are_those_of_lm_eval():
    assert evaluation.item_values([item()], [LOGLIKS], "acc").tolist() == [0.0]
    assert evaluation.item_values([item()], [LOGLIKS], "acc_norm").tolist() == [1.0]
    assert evaluation.item_values([item(acc_norm=False)], [LOGLIKS], "acc_norm").tolist() == [0.0]
    assert evaluation.item_values([item(gold=0)], [np.array([-1.0, -1.0])], "acc").tolist() == [1.0]
    assert evaluation.item_values([item(gold=1)], [np.array([-1.0, -1.0])], "acc").tolist() == [0.0]


def test_the_margin_is_chance_corrected_probability_per_character():
    expected = (1 / (1 + math.exp(-0.5)) - 0.5) / 0.5
    assert evaluation.item_values([item()], [LOGLIKS], "margin")[0] == pytest.approx(expected)


def test_the_margin_of_a_task_without_acc_norm_takes_no_lengths():
    several = item(contexts=("a", "a longer"), lengths=(1, 8), choices=(" end", " end"), acc_norm=False)
    weights = [math.exp(value) for value in LOGLIKS]
    expected = (weights[several.gold] / sum(weights) - 0.5) / 0.5
    assert evaluation.item_values([several], [LOGLIKS], "margin")[0] == pytest.approx(expected)


@given(st.lists(st.floats(-1e4, 0), min_size=2, max_size=6), st.data())
def test_the_margin_lies_in_its_range_and_rises_with_the_right_choice(values, data):
    gold = data.draw(st.integers(0, len(values) - 1))
    one = item(gold=gold, lengths=(3,) * len(values), choices=("abc",) * len(values))
    margin = evaluation.item_values([one], [np.array(values)], "margin")[0]
    assert -1 / (len(values) - 1) - 1e-9 <= margin <= 1 + 1e-9
    better = np.array(values)
    better[gold] += 1.0
    assert evaluation.item_values([one], [better], "margin")[0] >= margin
    assert evaluation.item_values([one], [np.zeros(len(values))], "margin")[0] == pytest.approx(0, abs=1e-12)


def log_score(values, gold, **facts):
    one = item(gold=gold, contexts=("c",), choices=("abc",) * len(values), **facts)
    return evaluation.item_values([one], [np.array(values, dtype=float)], "log_score")[0]


@pytest.mark.parametrize("gold", [0, 1, 2])
@pytest.mark.parametrize("acc_norm", [True, False])
def test_the_log_score_is_chance_corrected_logarithm_of_the_probability_per_character(gold, acc_norm):
    logliks, lengths = [-4.0, -3.0, -9.5], (4, 2, 5)
    weights = [math.exp(x / n if acc_norm else x) for x, n in zip(logliks, lengths, strict=True)]
    expected = math.log(3 * weights[gold] / sum(weights)) / math.log(3)
    assert log_score(logliks, gold, lengths=lengths, acc_norm=acc_norm) == pytest.approx(expected)


@given(st.lists(st.floats(-1e4, 0), min_size=2, max_size=6), st.data())
def test_the_log_score_is_at_most_one_and_rises_with_the_right_choice(values, data):
    gold, count = data.draw(st.integers(0, len(values) - 1)), len(values)
    found = log_score(values, gold, lengths=(3,) * count)
    assert math.isfinite(found)
    assert found <= 1
    raised = [x + 1.0 if i == gold else x for i, x in enumerate(values)]
    assert log_score(raised, gold, lengths=(3,) * count) >= found
    if found < 0.999:  # where the probability is not all but 1, it rises in truth
        assert log_score(raised, gold, lengths=(3,) * count) > found
    one = item(gold=gold, lengths=(3,) * count, choices=("abc",) * count)
    margin = evaluation.item_values([one], [np.array(values)], "margin")[0]
    assert (1 - 1 / count) * margin + 1 / count == pytest.approx(count ** (found - 1), abs=1e-9)  # both are of one p


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_log_score_at_chance_at_certainty_and_at_ties(count):
    lengths = (3,) * count
    assert log_score([-7.0] * count, 0, lengths=lengths) == pytest.approx(0, abs=1e-12)
    assert log_score([0.0] + [-1e4] * (count - 1), 0, lengths=lengths) == 1.0
    for gold in (0, 1):  # neither of two equal choices is preferred: p is a half
        tied = log_score([-1.0, -1.0] + [-1e4] * (count - 2), gold, lengths=lengths)
        assert tied == pytest.approx(1 - math.log(2) / math.log(count))
    # e^-3000 is no float, its logarithm is
    assert log_score([-9e3] + [0.0] + [-1e5] * (count - 2), 0, lengths=lengths) == pytest.approx(
        1 - 3000 / math.log(count)
    )


def test_task_scores_carry_standard_errors():
    items = [item(gold=gold) for gold in (0, 1, 1, 1)]
    score = evaluation.task_score(items, [LOGLIKS] * 4)
    assert (score.task, score.n, score.acc, score.acc_norm) == ("made", 4, 0.75, 0.25)
    assert score.acc_stderr == pytest.approx(np.std([0, 1, 1, 1], ddof=1) / 2)
    for metric in get_args(Metric):
        values = evaluation.item_values(items, [LOGLIKS] * 4, metric)
        assert score.of(metric) == pytest.approx((values.mean(), values.std(ddof=1) / 2))
    bare = evaluation.task_score([item(acc_norm=False)], [LOGLIKS])
    assert (bare.acc_norm, bare.acc_norm_stderr, bare.acc_stderr) == (None, None, 0.0)


def test_the_objective_is_the_mean_over_tasks():
    one = evaluation.task_score([item(gold=gold) for gold in (0, 1, 1)], [LOGLIKS] * 3)
    two = evaluation.task_score([item(acc_norm=False), item(acc_norm=False, gold=1)], [LOGLIKS] * 2)
    for metric in ("margin", "log_score", "acc"):
        value, error = mean_of([one, two], metric)
        assert value == pytest.approx((getattr(one, metric) + getattr(two, metric)) / 2)
        errors = getattr(one, f"{metric}_stderr"), getattr(two, f"{metric}_stderr")
        assert error == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert mean_of([two], "acc_norm") == (two.acc, two.acc_stderr)
    assert mean_of([one, two], "acc_norm")[0] == pytest.approx((one.acc_norm + two.acc) / 2)
    assert all(math.isnan(x) for x in mean_of([], "margin"))
    assert isinstance(one, TaskScore)


@pytest.mark.parametrize("window", [8, 64])
def test_perplexity_is_that_of_windows_alone(window):
    model = sample.model()
    tokens = torch.randint(3, 600, (200,), generator=torch.Generator().manual_seed(0))
    losses = []
    for line in tokens[: 200 // window * window].view(-1, window):
        with torch.no_grad():
            logprobs = model(input_ids=line[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logprobs[torch.arange(window - 1), line[1:]].mean())
    expected = math.exp(torch.stack(losses).mean())
    assert evaluation.perplexity(model, tokens, window) == pytest.approx(expected, rel=1e-5)
    assert evaluation.perplexity(model, tokens, window, token_budget=window) == pytest.approx(expected, rel=1e-5)


def test_logits_are_made_in_pieces(monkeypatch):
    tokens = torch.randint(3, 600, (128,), generator=torch.Generator().manual_seed(0))
    whole = evaluation.perplexity(sample.model(), tokens, 32)
    monkeypatch.setattr("adasearch.tuning.head._MAX_LOGITS", 600 * 7)
    monkeypatch.setattr("adasearch.tuning.head._CACHED_LOGITS", 600 * 3)
    assert evaluation.perplexity(sample.model(), tokens, 32) == pytest.approx(whole, rel=1e-6)


def test_perplexity_refuses_short_text_and_broken_models():
    with pytest.raises(DataError, match="given 64 and 10"):
        evaluation.perplexity(sample.model(), torch.arange(10), 64)
    broken = sample.model(seed=9)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    with pytest.raises(TrialError, match="not finite"):
        evaluation.perplexity(broken, torch.arange(64), 32)
