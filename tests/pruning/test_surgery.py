"""The golden property, per family and unit: a cut model computes what the dense one does with the units zeroed."""

import pytest
import torch

from adasearch import models
from adasearch.errors import ModelError
from adasearch.pruning import surgery
from tests import tiny

CASES = [(family, unit) for family in tiny.FAMILIES for unit in ("kv_group", "head")]


def _widths(structure):
    """Other widths in every layer, one group dense, one of a single unit."""
    widths = {g.name: max(1, g.width - 1 - 5 * g.layer if g.kind == "mlp" else g.width - 1) for g in structure.groups}
    widths["model.layers.1.self_attn"] = structure.group("model.layers.1.self_attn").width
    widths["model.layers.2.mlp"] = 1
    return widths


def _case(family, unit, dtype=torch.float64, biases=False, **changes):
    config = tiny.tiny_config(family, num_hidden_layers=3, **changes)
    weights = tiny.tiny_weights(config, dtype)
    structure, units = tiny.tiny_structure(config, unit)
    added = structure.output_biases if biases else ()
    plan = tiny.random_plan(structure, units, _widths(structure), seed=3, biases=added)
    return config, weights, structure, plan


def _tokens(batch=2, length=17):
    return torch.randint(3, tiny.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(5))


def _logits(model):
    with torch.no_grad():
        return model(input_ids=_tokens()).logits


@pytest.mark.parametrize(("family", "unit"), CASES)
@pytest.mark.parametrize("biases", [False, True])
def test_cut_equals_zeroed(family, unit, biases):
    case = _case(family, unit, biases=biases)
    before = {name: w.clone() for name, w in case[1].items()}
    small, dense = surgery.cut(*case), surgery.zeroed(*case)
    assert (_logits(small) - _logits(dense)).abs().max() < 1e-10
    untouched = models.assemble(models.empty_model(case[0]), case[1])
    assert (_logits(small) - _logits(untouched)).abs().max() > 1e-3
    assert sum(p.numel() for p in small.parameters()) == case[3].parameters
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert all(torch.equal(before[name], w) for name, w in case[1].items())


@pytest.mark.parametrize(("family", "unit"), CASES)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_narrow_in_place_equals_cut_and_leaves_the_weights(family, unit, biases, mlp_bias):
    changes = {"mlp_bias": True, "attention_bias": True} if mlp_bias and family == "llama" else {}
    case = _case(family, unit, biases=biases, **changes)
    before = {name: w.clone() for name, w in case[1].items()}
    model = models.assemble(models.empty_model(case[0]), case[1])
    surgery.narrow(model, *case[2:])
    small = surgery.cut(*case)
    assert torch.equal(_logits(model), _logits(small))
    found = dict(model.named_parameters())
    for group in case[2].groups:
        if len(case[3].keep[group.name]) < group.units:
            for kind in ("weight", "bias"):
                name = f"{group.output}.{kind}"
                assert (name in found) == (name in dict(small.named_parameters()))
                if name in found:
                    found[name].data.add_(1.0)
    assert all(torch.equal(before[name], w) for name, w in case[1].items())


@pytest.mark.parametrize("unit", ["kv_group", "head"])
def test_cut_equals_zeroed_with_every_bias_and_untied(unit):
    case = _case("llama", unit, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    small = surgery.cut(*case)
    assert (_logits(small) - _logits(surgery.zeroed(*case))).abs().max() < 1e-10
    assert small.lm_head.weight is not small.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_cut_equals_zeroed_with_sliding_windows(family):
    changes = {"sliding_window": 4} if family == "mistral" else {"sliding_window": 4, "use_sliding_window": True}
    case = _case(family, "kv_group", **changes, **({} if family == "mistral" else {"max_window_layers": 1}))
    assert (_logits(surgery.cut(*case)) - _logits(surgery.zeroed(*case))).abs().max() < 1e-10


@pytest.mark.parametrize(("family", "unit"), CASES)
def test_generation_with_and_without_cache(family, unit):
    model = surgery.cut(*_case(family, unit))
    told = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones(2, 17).long()}
    cached = model.generate(_tokens(), use_cache=True, **told)
    assert torch.equal(cached, model.generate(_tokens(), use_cache=False, **told))
    assert cached.shape == (2, 29)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_number_format_is_kept_and_base_is_shared_by_nothing(dtype):
    config, weights, structure, plan = _case("llama", "head", dtype, biases=True)
    model = surgery.cut(config, weights, structure, plan)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.config.dtype == dtype
    assert not model.training
    before = {name: w.clone() for name, w in weights.items()}
    with torch.no_grad():
        for p in model.parameters():
            assert p.requires_grad
            p.add_(1)
    assert all(torch.equal(before[name], w) for name, w in weights.items())
    assert all(not buffer.is_meta and buffer.dtype == torch.float32 for buffer in model.buffers())


def test_tied_embeddings_stay_tied():
    model = surgery.cut(*_case("llama", "kv_group"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dense_plan_gives_the_dense_model():
    config, weights, structure, plan = _case("qwen3", "head")
    plan = tiny.random_plan(structure, plan.units, {})
    dense = models.assemble(models.empty_model(config), weights)
    assert torch.equal(_logits(surgery.cut(config, weights, structure, plan)), _logits(dense))


@pytest.mark.parametrize("unit", ["kv_group", "head"])
def test_config_tells_uniform_widths(unit):
    config = tiny.tiny_config()
    structure, units = tiny.tiny_structure(config, unit)
    widths = {g.name: 24 if g.kind == "mlp" else g.width - 1 for g in structure.groups}
    weights = tiny.tiny_weights(config)
    model = surgery.cut(config, weights, structure, tiny.random_plan(structure, units, widths))
    told = (model.config.intermediate_size, model.config.num_attention_heads, model.config.num_key_value_heads)
    assert told == (24, *((4, 2) if unit == "kv_group" else (3, 3)))
    assert model.config.head_dim == 8
    assert config.intermediate_size == 40
    stock = models.assemble(models.empty_model(model.config), dict(model.named_parameters()))
    assert torch.equal(_logits(stock), _logits(model))


def test_config_keeps_dense_numbers_where_layers_differ():
    config, weights, structure, plan = _case("llama", "kv_group")
    told = surgery.cut(config, weights, structure, plan).config
    assert (told.intermediate_size, told.num_attention_heads, told.num_key_value_heads) == (40, 6, 3)


def test_modules_know_their_widths():
    config, _, structure, plan = _case("llama", "head")
    model = surgery.skeleton(config, structure, plan)
    assert [layer.self_attn.num_key_value_groups for layer in model.model.layers] == [1, 2, 1]
    assert [layer.mlp.intermediate_size for layer in model.model.layers] == [39, 34, 1]
    assert all(p.is_meta for p in model.parameters())


def test_weights_of_another_shape_are_refused():
    config, weights, structure, plan = _case("llama", "kv_group")
    weights.pop("model.norm.weight")
    with pytest.raises(ModelError, match=r"model\.norm\.weight must be \(24,\), given absent"):
        surgery.cut(config, weights, structure, plan)


def test_plan_with_other_units_is_refused():
    config, weights, _, plan = _case("llama", "kv_group")
    other, _ = tiny.tiny_structure(config, "head")
    with pytest.raises(ModelError, match="must"):
        surgery.cut(config, weights, other, plan)
