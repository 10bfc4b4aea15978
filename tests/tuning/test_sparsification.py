"""Sparsification modules: their formulas, what they compute, and the smaller model that they fold into."""

import math

import pytest
import torch

from adasearch import models
from adasearch.config import component
from adasearch.errors import ConfigError, TrialError
from adasearch.outlined import config_of
from adasearch.pruning.hidden import highest
from adasearch.pruning.structure import Outline
from adasearch.registry import HIDDEN
from adasearch.tuning import decoder, sparsification
from adasearch.tuning.learning import fresh_updates
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.sparsification import Goal, Sparsified, sparsify
from adasearch.tuning.training import next_token_loss
from tests.pruning.sample import sample
from tests.tuning.test_recovery import stream

D, KEPT = 24, 18


def goal(**changes):
    given = {"tokens": 30 * 64, "length": 16, "batch": 4, "inner": 3, "rank": 2, "mask_lr": 0.05, **changes}
    found = component(HIDDEN, {"type": "pat", **given}, "hidden").options
    return Goal(torch.linspace(-0.2, 0.3, D), KEPT, found)


def dense(case):
    return models.assemble(models.empty_model(case.config), case.weights).requires_grad_(requires_grad=False)


def riding(case, model, steps=30, **changes):
    torch.manual_seed(0)
    asked = goal(**changes)
    updates = fresh_updates(model, case.structure, asked.options, "hidden", ("q", "k", "v", "gate", "up"))
    return Sparsified(model, case.structure, updates, asked, steps)


@pytest.mark.parametrize("done", [0, 1, 10, 23])
def test_the_mask_sharpens_as_published(done):
    case = sample(dtype=torch.float32)
    found = riding(case, dense(case))
    found.stepped(done, None, None)
    tau = 1 / (1 - math.log(max(1, done)) / math.log(30))
    expected = [1 / (1 + math.exp(-tau * m)) + max(0.5 - done / 30, 0) for m in found.scores.tolist()]
    assert found.mask().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("done", [24, 29, 30])
def test_a_frozen_mask_keeps_the_number(done):
    case = sample(dtype=torch.float32)
    found = riding(case, dense(case))
    found.stepped(done, None, None)
    mask = found.mask()
    assert mask.tolist() == [0.0] * (D - KEPT) + [1.0] * KEPT
    assert not mask.requires_grad


def test_the_penalty_and_its_gradient():
    case = sample(dtype=torch.float32)
    found = riding(case, dense(case))
    m = found.scores.double().tolist()
    identity = 0.0
    for inner, _, _ in found._modules.values():
        e = inner.detach().double()
        gaps = [((e[i] * e[j]).sum().item() - (i == j)) ** 2 for i in range(3) for j in range(3)]
        identity += sum(gaps) / 9 / len(found._modules)
    up, down = [x for x in m if x >= 0], [x for x in m if x < 0]
    apart = sum((x - 0.5) ** 2 for x in up) / len(up) + sum((x + 0.5) ** 2 for x in down) / len(down)
    penalty = found.penalty()
    assert penalty.item() == pytest.approx(identity + 10 * abs(len(up) - KEPT) / KEPT + apart, rel=1e-5)
    penalty.backward()
    sign = math.copysign(1, len(up) - KEPT)
    for place, x in enumerate(m):
        s = 1 / (1 + math.exp(-x))
        pull = 2 * (x - 0.5) / len(up) if x >= 0 else 2 * (x + 0.5) / len(down)
        slope = (10 * sign / KEPT * s * (1 - s) + pull) * found._ratio
        assert found._z.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    found.stepped(30, None, None)
    assert found.penalty().item() == pytest.approx(identity, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_updates_compute_what_modules_behind_projections_do(family):
    """y = s M (x + U E x) of every output, put into transformers' own model by hooks; M behind the embedding."""
    case = sample(family=family, dtype=torch.float32)
    model = dense(case)
    found = riding(case, model)
    with torch.no_grad():
        for part in found.parameters()[:-1]:
            part.copy_(part + 0.1 * torch.randn_like(part))
        found.stepped(5, None, None)
        mask = found.mask()
        got = decoder.hidden_states(model, case.tokens, updates=found.updates())

        def behind(inner, outer, scale):
            return lambda _module, _given, x: scale * mask * (x + x @ inner.T @ outer.T)

        for module, parts in found._modules.items():
            module.register_forward_hook(behind(*parts))
        model.get_input_embeddings().register_forward_hook(lambda _module, _given, x: x * mask)
        for module, update in found._updates.items():
            module.weight = torch.nn.Parameter(module.weight + update.scale * update.b @ update.a)
        expected = model.model(input_ids=case.tokens).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def smaller(case, model, kept):
    weights = dict(model.named_parameters())
    for piece in case.structure.stream:
        weights[piece.parameter] = weights[piece.parameter].detach().index_select(piece.dim, torch.tensor(kept))
    config = config_of(case.config, Outline(hidden=kept))
    return models.assemble(models.empty_model(config), {n: weights[n] for n in case.weights})


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [("llama", torch.float32, True), ("qwen3", torch.float32, False), ("llama", torch.bfloat16, False)],
)
def test_the_model_that_is_left_is_the_one_that_was_trained(family, dtype, tied, monkeypatch):
    case = sample(family=family, dtype=dtype, tie_word_embeddings=tied)
    before = {name: weight.clone() for name, weight in case.weights.items()}
    model, ids = dense(case), stream(256, seed=2).view(16, 16)
    seen, losses = [], []
    fold = sparsification.fold

    def spy(model, updates):
        same = {m: u._replace(a=u.a.to(dtype), b=u.b.to(dtype)) for m, u in updates.items()}
        seen.append(next_token_loss(model, ids, updates=same)[1].item())
        fold(model, updates)

    monkeypatch.setattr(sparsification, "fold", spy)
    context = RecoveryContext(tell=lambda progress: losses.append(progress.loss))
    scores = sparsify(model, case.structure, stream(), goal(lr=5e-3, distill=0.0), context)
    assert not any(p.requires_grad for p in model.parameters())
    small = smaller(case, model, highest(scores, KEPT))
    assert small.config.hidden_size == KEPT
    with torch.no_grad():
        found = next_token_loss(small, ids)[1].item()
    assert found == pytest.approx(seen[0], abs=2e-4 if dtype == torch.float32 else 5e-2)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.3
    assert all(torch.equal(case.weights[name], weight) for name, weight in before.items())


def test_it_is_the_same_again_and_another_with_another_seed():
    case = sample(dtype=torch.float32)
    first, again, other = (
        sparsify(dense(case), case.structure, stream(), goal(), RecoveryContext(seed=seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_biases_that_write_to_the_stream_are_refused():
    case = sample(dtype=torch.float32, attention_bias=True)
    with pytest.raises(TrialError, match=r"hidden\.pat needs output projections without biases"):
        sparsify(dense(case), case.structure, stream(), goal(), RecoveryContext())


def test_a_rank_above_a_projection_is_refused():
    case = sample(dtype=torch.float32)
    with pytest.raises(TrialError, match=r"hidden\.rank.* must be at most"):
        sparsify(dense(case), case.structure, stream(), goal(rank=400), RecoveryContext())


@pytest.mark.parametrize(
    ("key", "given"), [("frozen", 1.0), ("inner", 0), ("mask_lr", 0), ("remove", 1.5), ("sharpness", 1)]
)
def test_settings_out_of_range_are_refused_with_their_path(key, given):
    with pytest.raises(ConfigError, match=rf"hidden\.{key}"):
        component(HIDDEN, {"type": "pat", key: given}, "hidden")
