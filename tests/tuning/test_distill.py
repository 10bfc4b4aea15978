"""Distillation: its loss against autograd, and that it brings the predictions of two models together."""

import copy
import dataclasses

import pytest
import torch
from torch.nn import functional

from adasearch.config import component
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning.structure import Outline
from adasearch.registry import RECOVERY
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.training import Lesson, next_token_loss
from tests import tiny
from tests.tuning.test_recovery import cut_model, recover, stream, taught


def states_of(model, ids):
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
    return hidden, model.lm_head(hidden)


def divergence(model, teacher, ids):
    with torch.no_grad():
        log_p, log_q = (states_of(m, ids)[1].log_softmax(-1) for m in (model, teacher))
    return functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(
    ("weight", "temperature", "hidden", "hard"),
    [(0.7, 1.0, 0.0, 1.0), (2.0, 3.0, 0.0, 0.0), (0.5, 0.5, 0.4, 0.3), (0.0, 2.0, 1.5, 0.6)],
)
def test_loss_and_gradients_equal_autograd(weight, temperature, hidden, hard, monkeypatch):
    monkeypatch.setattr("adasearch.tuning.head._MAX_LOGITS", 13 * tiny.VOCABULARY)
    monkeypatch.setattr("adasearch.tuning.head._CACHED_LOGITS", 5 * tiny.VOCABULARY)
    model, _ = cut_model(tie_word_embeddings=False)
    teacher, _ = cut_model(intermediate_size=48, tie_word_embeddings=False)
    twin = copy.deepcopy(model)
    ids = stream(64).view(4, 16)
    total, nll = next_token_loss(model, ids, lesson=Lesson(teacher, weight, temperature, hidden, hard))
    total.backward()
    own, logits = states_of(twin, ids)
    theirs, wanted = (x.detach() for x in states_of(teacher, ids))
    cross = functional.cross_entropy(logits, ids[:, 1:].flatten())
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (logits, wanted))
    soft = temperature**2 * functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    apart = ((own - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    expected = hard * cross + weight * soft + hidden * apart
    expected.backward()
    assert nll.item() == pytest.approx(cross.item(), rel=1e-6)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, mine), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=2e-6, msg=name)


def test_a_model_that_is_its_teacher_has_nothing_to_learn():
    model, _ = cut_model()
    ids = stream(64).view(4, 16)
    model.requires_grad_(True)
    total, nll = next_token_loss(model, ids, lesson=Lesson(copy.deepcopy(model), 1.0, 2.0, 1.0, 0.0))
    total.backward()
    assert total.item() == pytest.approx(0.0, abs=1e-5)
    assert nll.item() > 1.0
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-5


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_predictions_come_together(rank, hidden):
    model, structure = cut_model()
    teacher = taught(model)
    ids = stream(64, seed=4).view(4, 16)
    before = divergence(model, teacher, ids)
    kept = {k: v.clone() for k, v in teacher.state_dict().items()}
    recover("distill", model, structure, context=RecoveryContext(teacher=teacher), rank=rank, hidden=hidden, lr=1e-2)
    assert divergence(model, teacher, ids) < 0.8 * before
    assert all(torch.equal(v, kept[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(("other", "rank"), [("full", 0), ("lora", 4)])
def test_it_is_the_strategy_that_its_rank_says(other, rank):
    found = []
    for name in ("distill", other):
        model, structure = cut_model()
        more = {"hard": 1.0, "rank": rank} if name == "distill" else {"rank": 4} if name == "lora" else {}
        context = RecoveryContext(seed=3, teacher=taught(model))
        recover(name, model, structure, context=context, distill=0.7, lr=1e-3, **more)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_states_of_other_sizes_are_refused():
    model, structure = cut_model()
    smaller = dataclasses.replace(structure, outline=Outline(hidden=(0, 1)))
    context = RecoveryContext(teacher=model)
    with pytest.raises(TrialError, match=r"recovery\.hidden must be 0 where hidden dimensions go, given 0.5"):
        recover("distill", model, smaller, context=context, hidden=0.5)


def test_a_teacher_is_needed():
    model, structure = cut_model()
    with pytest.raises(TrialError, match="needs the dense model"):
        recover("distill", model, structure)


@pytest.mark.parametrize(
    ("key", "given"), [("temperature", 0.0), ("rank", -1), ("distill", 0.0), ("hard", -1.0), ("softness", 1)]
)
def test_settings_out_of_range_are_refused_with_their_path(key, given):
    with pytest.raises(ConfigError, match=rf"recovery\.{key}"):
        component(RECOVERY, {"type": "distill", key: given}, "recovery")
