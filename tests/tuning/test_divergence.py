"""Divergence from the dense model against the full softmax of both models; what it must leave alone."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from adasearch.errors import TrialError
from adasearch.tuning import divergence as module
from adasearch.tuning.divergence import STRIDE, WINDOW, divergence, num_windows, reference
from tests.tuning import sample


def tokens(windows=5, length=WINDOW):
    return torch.randint(3, 600, (windows, length), generator=torch.Generator().manual_seed(0))


def brute_force(dense, model, batch):
    """KL at the compared positions from all logits of both models in float64, N x P."""
    with torch.no_grad():
        p, q = (m(input_ids=batch).logits.double().log_softmax(-1) for m in (dense, model))
    return (p.exp() * (p - q)).sum(-1)[:, STRIDE - 1 :: STRIDE]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_is_that_of_the_full_softmax_of_both_models(family):
    dense, model = sample.model(family, seed=0), sample.model(family, seed=1)
    expected = brute_force(dense, model, tokens())
    mean, error = divergence(model, reference(dense, tokens()))
    assert expected.mean() > 0.1
    assert mean == pytest.approx(float(expected.mean()), abs=1e-5)
    means = expected.mean(1)
    assert error == pytest.approx(float(means.std()) / math.sqrt(len(means)), abs=1e-5)


def test_a_smaller_model_has_the_vocabulary_but_not_the_widths():
    dense, narrow = sample.model(), sample.model(seed=2, intermediate_size=16, num_hidden_layers=1)
    mean, _ = divergence(narrow, reference(dense, tokens()))
    assert mean == pytest.approx(float(brute_force(dense, narrow, tokens()).mean()), abs=1e-5)


def test_pieces_and_batches_change_nothing(monkeypatch):
    dense, model = sample.model(), sample.model(seed=1)
    whole = divergence(model, reference(dense, tokens()))
    monkeypatch.setattr("adasearch.tuning.head._MAX_LOGITS", 600 * 7)
    monkeypatch.setattr("adasearch.tuning.head._CACHED_LOGITS", 600 * 3)
    monkeypatch.setattr(module, "_BATCH", WINDOW * 2)
    assert divergence(model, reference(dense, tokens())) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dense_model_has_none_and_any_other_has_some(dtype):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(sample.model().config).to(dtype).eval()
    against = reference(dense, tokens())
    assert divergence(dense, against) == (0.0, 0.0)
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    mean, error = divergence(dense, against)
    assert mean > 0
    assert error > 0


def test_it_draws_no_random_number_and_the_model_can_still_be_trained():
    dense, model = sample.model(), AutoModelForCausalLM.from_config(sample.model().config).eval()
    against = reference(dense, tokens())
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    divergence(model, against)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_dense_side_is_small():
    against = reference(sample.model(), tokens(16))
    assert against.num_bytes == 16 * WINDOW * 8 + 16 * WINDOW // STRIDE * 24 * 4
    assert against.head is sample.model().lm_head
    assert (num_windows(1024), num_windows(10), num_windows(300 / 4)) == (16, 2, 2)


def test_a_broken_model_is_refused():
    broken = AutoModelForCausalLM.from_config(sample.model().config).eval()
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    with pytest.raises(TrialError, match="divergence from the dense model is nan"):
        divergence(broken, reference(sample.model(), tokens()))
