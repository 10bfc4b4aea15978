import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.config import component
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning import surgery
from adasearch.registry import RECOVERY
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.training import Lesson, Masters, TrainingConfig, learning_rate, next_token_loss, sequences
from tests import tiny

LENGTH, BATCH = 16, 4
TRAINING = [name for name in RECOVERY.names() if name != "none"]


def cut_model(family="llama", dtype=torch.float32, **changes):
    config = tiny.tiny_config(family, **changes)
    structure, units = tiny.tiny_structure(config)
    widths = {g.name: max(1, g.width - 1 - g.layer) for g in structure.groups}
    plan = tiny.random_plan(structure, units, widths)
    return surgery.cut(config, tiny.tiny_weights(config, dtype), structure, plan), structure


def stream(count=600, seed=0):
    """Return tokens with something to learn: a short pattern with noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(3, tiny.VOCABULARY, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, noise, torch.arange(count) % 7 + 3)


def options(name, **changes):
    given = {"tokens": 8 * BATCH * LENGTH, "length": LENGTH, "batch": BATCH, **changes} if name != "none" else {}
    return component(RECOVERY, {"type": name, **given}, "recovery").options


def recover(name, model, structure, tokens=None, context=None, **changes):
    tokens = stream() if tokens is None else tokens
    return RECOVERY.get(name).function(
        model, structure, tokens, options(name, **changes), context or RecoveryContext(seed=3)
    )


def taught(model):
    """Return a copy of a model that has learnt the stream: a teacher."""
    found = copy.deepcopy(model)
    with torch.random.fork_rng():
        recover("full", found, None, lr=1e-2)
    return found


def plain_loss(model, ids):
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False])
def test_chunked_loss_and_gradients_equal_the_plain_ones(tied, monkeypatch):
    monkeypatch.setattr("adasearch.tuning.head._MAX_LOGITS", 13 * tiny.VOCABULARY)
    monkeypatch.setattr("adasearch.tuning.head._CACHED_LOGITS", 5 * tiny.VOCABULARY)
    model, _ = cut_model(tie_word_embeddings=tied)
    twin = copy.deepcopy(model)
    ids = stream(64).view(4, 16)
    total, nll = next_token_loss(model, ids)
    total.backward()
    logits = twin(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert total.item() == nll.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, mine), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_distillation_loss_and_gradients_equal_autograd(monkeypatch):
    monkeypatch.setattr("adasearch.tuning.head._MAX_LOGITS", 13 * tiny.VOCABULARY)
    monkeypatch.setattr("adasearch.tuning.head._CACHED_LOGITS", 5 * tiny.VOCABULARY)
    model, _ = cut_model()
    teacher, _ = cut_model(hidden_size=24, intermediate_size=48)
    twin = copy.deepcopy(model)
    ids = stream(64).view(4, 16)
    total, nll = next_token_loss(model, ids, lesson=Lesson(teacher, 0.7))
    total.backward()
    log_p = twin(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    log_q = teacher(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1).detach()
    cross = torch.nn.functional.nll_loss(log_p, ids[:, 1:].flatten())
    expected = cross + 0.7 * torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    expected.backward()
    assert nll.item() == pytest.approx(cross.item(), rel=1e-6)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, plain in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-6)


@given(st.integers(2, 90), st.integers(1, 200), st.integers(2, 9), st.integers(1, 4))
def test_batches_walk_the_stream_in_order_and_start_again(size, tokens, length, batch):
    run = TrainingConfig(tokens=tokens, length=length, batch=batch, lr=1.0)
    walked = torch.cat([ids.flatten() for ids in sequences(torch.arange(size), run)])
    assert len(walked) == run.steps * length * batch
    assert walked.tolist() == [i % size for i in range(len(walked))]
    assert run.steps == max(1, tokens // (length * batch))


@given(st.integers(1, 300), st.floats(0, 1))
def test_learning_rate_rises_to_its_top_and_falls(steps, warmup):
    run = TrainingConfig(tokens=steps, length=1, batch=1, lr=0.5, warmup=warmup)
    rates = [learning_rate(i, run) for i in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.5)
    assert min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_masters_gather_updates_below_the_resolution_of_bfloat16():
    parameter = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    masters = Masters([parameter], TrainingConfig(tokens=1, length=8, batch=1, lr=1e-3))
    seen = []
    for _ in range(10):  # steps of 0.001, while the bfloat16 below 1 is 0.996
        parameter.grad = torch.ones_like(parameter)
        masters.step(1e-3)
        seen.append(parameter[0, 0].item())
    assert seen[0] == 1.0
    assert seen[-1] == pytest.approx(0.99, abs=0.003)
    assert parameter.dtype == torch.bfloat16
    assert masters.copies[0][0, 0].item() == pytest.approx(0.99, abs=1e-5)


@pytest.mark.parametrize("name", TRAINING)
def test_distillation_asks_for_the_dense_model(name):
    model, structure = cut_model()
    with pytest.raises(TrialError, match="needs the dense model"):
        recover(name, model, structure, distill=0.5)
    assert not any(p.requires_grad for p in model.parameters())
    teacher = copy.deepcopy(model)
    report = recover(name, model, structure, distill=0.5, context=RecoveryContext(seed=3, teacher=teacher))
    assert len(report.losses) == 8
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", TRAINING)
def test_weights_that_are_not_finite_are_told(name):
    model, structure = cut_model()
    model.model.norm.weight.data[0] = math.nan
    with pytest.raises(TrialError, match="step 1 of 8") as caught:
        recover(name, model, structure, context=RecoveryContext(teacher=cut_model()[0]))
    assert (caught.value.kind, caught.value.phase) == ("nan", "recover")


@pytest.mark.parametrize("name", TRAINING)
def test_an_error_in_the_middle_leaves_no_adapter(name):
    model, structure = cut_model()
    names = list(model.state_dict())

    def stop(progress):
        assert (progress.steps, math.isfinite(progress.loss)) == (8, True)
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(name, model, structure, context=RecoveryContext(tell=stop, teacher=cut_model()[0]))
    assert list(model.state_dict()) == names
    assert not hasattr(model, "peft_config")
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_a_stream_that_is_too_short_is_refused():
    model, structure = cut_model()
    with pytest.raises(TrialError, match="at least 2 tokens"):
        recover("full", model, structure, tokens=torch.tensor([3]))


@pytest.mark.parametrize(
    ("name", "key", "given"), [("lora", "rank", 0), ("lora", "dropout", 1.0), ("full", "lr", 0), ("full", "rank", 4)]
)
def test_settings_out_of_range_are_refused_with_their_path(name, key, given):
    with pytest.raises(ConfigError, match=rf"recovery\.{key}"):
        component(RECOVERY, {"type": name, key: given}, "recovery")
