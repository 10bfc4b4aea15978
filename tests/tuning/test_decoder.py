"""The decoder as a function against transformers' own modules, and its hand-written gradients against numbers."""

import copy

import pytest
import torch
from torch.autograd import gradcheck

from adasearch.pruning import surgery
from adasearch.tuning import attention, decoder, kernels
from adasearch.tuning.attention import Layout
from adasearch.tuning.decoder import Update
from adasearch.tuning.kernels import Projection, Rotation
from tests import tiny


def cut_model(family="llama", dtype=torch.float32, attention="kv_group", **changes):
    config = tiny.tiny_config(family, **changes)
    structure, units = tiny.tiny_structure(config, attention)
    widths = {g.name: max(1, g.width - 1 - g.layer) for g in structure.groups}
    biases = tuple(g.output for g in structure.groups if g.layer == 0)
    plan = tiny.random_plan(structure, units, widths, biases=biases)
    model = surgery.cut(config, tiny.tiny_weights(config, dtype), structure, plan)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".bias") in biases:
            torch.nn.init.normal_(parameter, generator=generator)
    return model


def tokens(batch=3, length=20):
    return torch.randint(3, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["plain", "fused"])
def short(request, monkeypatch):
    monkeypatch.setattr(decoder, "_PLAIN_LENGTH", 256 if request.param else 0)


@pytest.mark.parametrize("attention", ["kv_group", "head"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_hidden_states_are_those_of_transformers(family, attention, short):
    model = cut_model(family, attention=attention)
    with torch.no_grad():
        expected = model.model(input_ids=tokens()).last_hidden_state
        torch.testing.assert_close(decoder.hidden_states(model, tokens()), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoder.hidden_states(model, tokens()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_sliding_window_hides_what_is_far(family, short):
    extra = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model = cut_model(family, sliding_window=6, **extra)
    windows = [decoder._window(layer) for layer in model.model.layers]
    assert windows == ([None, 6] if family == "qwen2" else [6, 6])
    expected = model.model(input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(decoder.hidden_states(model, tokens()), expected, rtol=1e-5, atol=1e-5)
    far = tokens()
    far[:, 0] = 3 + (far[:, 0] - 2) % 200
    changed = decoder.hidden_states(model, far)[:, -1] - decoder.hidden_states(model, tokens())[:, -1]
    assert (changed.abs().max() == 0) == (windows == [6, 6])  # two layers of 6 reach back 10 tokens, not 19


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradients_of_all_weights_are_those_of_autograd(family, short):
    model = cut_model(family).requires_grad_(True)
    twin = copy.deepcopy(model)
    weight = torch.randn(3, 20, 24, generator=torch.Generator().manual_seed(1))
    (decoder.hidden_states(model, tokens()) * weight).sum().backward()
    (twin.model(input_ids=tokens()).last_hidden_state * weight).sum().backward()
    compared = 0
    for (name, mine), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        if plain.grad is None:  # an untied head
            assert mine.grad is None
            continue
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4, msg=name)
        compared += 1
    assert compared > 15


def test_bfloat16_stays_as_near_to_float32_as_transformers_does():
    exact, rounded = cut_model(), cut_model(dtype=torch.bfloat16)
    with torch.no_grad():
        truth = exact.model(input_ids=tokens()).last_hidden_state
        theirs = (rounded.model(input_ids=tokens()).last_hidden_state - truth).square().mean().sqrt()
        ours = (decoder.hidden_states(rounded, tokens()) - truth).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


def test_other_models_are_left_to_transformers():
    model = cut_model()
    model.config.hidden_act = "gelu"
    assert not decoder.takes(model)
    seen = []
    model.model.register_forward_pre_hook(lambda *_: seen.append(1))
    decoder.last_hidden(model, tokens())
    model.config.hidden_act = "silu"
    assert decoder.takes(model)
    decoder.last_hidden(model, tokens())
    assert seen == [1]


def made(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def projection(outputs, inputs, seed, dropout=0.0, gained=False):
    factors = made(2, inputs, seed=seed + 1), made(outputs, 2, seed=seed + 2)
    gain = made(outputs, seed=seed + 3) if gained else None
    scale = 1.7 + seed / 10
    return Projection(made(outputs, inputs, seed=seed), made(outputs, seed=seed), *factors, scale, dropout, gain)


def flat(projections):
    return [tensor for p in projections for tensor in p.tensors]


def again(projections, values):
    parts = [values[5 * i : 5 * i + 5] for i in range(len(projections))]
    return tuple(Projection(*part[:4], p.scale, p.dropout, part[4]) for part, p in zip(parts, projections, strict=True))


@pytest.mark.parametrize(("dropout", "gained"), [(0.0, False), (0.4, False), (0.4, True)])
def test_gradients_of_projections_are_the_differences_of_their_values(dropout, gained):
    reads = (projection(4, 5, 0, dropout), projection(3, 5, 10, dropout, gained))
    down = projection(5, 3, 20, dropout, gained)

    def read(x, norm, *values):
        torch.manual_seed(4)
        return kernels.norm_project(x, norm, 1e-5, again(reads, values))

    def add(x, residual, *values):
        torch.manual_seed(4)
        return kernels.project_add(x, residual, *again((down,), values))

    def gated(gate, up, residual, *values):
        torch.manual_seed(4)
        return kernels.gated_add(gate, up, residual, *again((down,), values))

    assert gradcheck(read, (made(6, 5), made(5), *flat(reads)))
    assert gradcheck(add, (made(6, 3), made(6, 5), *flat((down,))))
    assert gradcheck(gated, (made(6, 3), made(6, 3, seed=1), made(6, 5), *flat((down,))))


def test_gradients_of_norm_rotation_and_attention_are_the_differences_of_their_values():
    angles = torch.rand(6, 2, dtype=torch.float64)
    rotation = Rotation.of(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))
    mask = decoder.causal_mask(3, None, torch.zeros((), dtype=torch.float64))
    layout = Layout(batch=2, key_heads=2, size=4, scale=0.3)
    assert gradcheck(lambda x, w: kernels.rms_norm(x, w, 1e-5), (made(6, 5), made(5)))
    assert gradcheck(lambda x: kernels.rotate(x, rotation.wide(3), 4), (made(6, 12),))
    heads = (made(6, 16), made(6, 8), made(6, 8, seed=1))
    assert gradcheck(lambda q, k, v: attention.attend(q, k, v, mask, layout), heads)


@pytest.mark.parametrize(("length", "block"), [(7, 3), (6, 3), (7, 1), (2, 3)])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("apart", [False, True])
def test_blocks_of_queries_attend_to_what_whole_sequences_do(monkeypatch, length, block, window, apart):
    mask = decoder.causal_mask(length, window, torch.zeros((), dtype=torch.float64))
    if apart:  # masks of the sequences' own: two documents in the second one
        mask = mask.repeat(2, 1, 1)
        mask[1, length // 2 :, : length // 2] = -torch.inf
    layout = Layout(batch=2, key_heads=2, size=4, scale=0.3)
    heads = (made(2 * length, 16), made(2 * length, 8), made(2 * length, 8, seed=1))
    found = []
    for size in (block, length):
        monkeypatch.setattr(attention, "_BLOCK", size)
        out = attention.attend(*heads, mask, layout)
        found.append((out, *torch.autograd.grad(out.square().sum(), heads)))
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole)
    monkeypatch.setattr(attention, "_BLOCK", block)
    assert gradcheck(lambda q, k, v: attention.attend(q, k, v, mask, layout), heads)


def test_dropout_keeps_the_mean_and_only_touches_the_update():
    p = projection(4, 50, 0, dropout=0.5)
    x = torch.ones(4000, 50, dtype=torch.float64)
    still = Projection(p.weight, p.bias, p.a, p.b, p.scale)
    with torch.no_grad():
        dropped, kept = kernels.project_add(x, x[:, :4], p), kernels.project_add(x, x[:, :4], still)
    base = x @ p.weight.T + p.bias + 1
    spread = (dropped - base).std(0)
    assert (spread > 0.1).all()
    torch.testing.assert_close(dropped.mean(0), kept.mean(0), rtol=0, atol=5 * spread.max().item() / 4000**0.5)


def test_a_gain_and_a_scale_of_its_own_act_on_each_projection():
    x, norm = made(6, 5).detach(), torch.ones(5, dtype=torch.float64)
    reads = (projection(4, 5, 0, gained=True), projection(3, 5, 10))
    rows = kernels.rms_norm(x, norm, 1e-5)
    with torch.no_grad():
        for found, p in zip(kernels.norm_project(x, norm, 1e-5, reads), reads, strict=True):
            gain = 1.0 if p.gain is None else p.gain
            torch.testing.assert_close(found, gain * (rows @ (p.weight + p.scale * p.b @ p.a).T) + p.bias)


def test_updates_of_some_modules_only():
    model = cut_model().requires_grad_(False)
    module = model.model.layers[1].mlp.up_proj
    a, b = torch.randn(2, module.in_features), torch.randn(module.out_features, 2)
    with torch.no_grad():
        found = decoder.hidden_states(model, tokens(), updates={module: Update(a, b, 0.3)})
        module.weight += 0.3 * b @ a
        expected = model.model(input_ids=tokens()).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
