"""Counts in closed form agree with models; every element of a sliced dimension belongs to exactly one unit."""

import math

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st

from adasearch import models
from adasearch.errors import ModelError
from adasearch.pruning import architectures, surgery
from adasearch.registry import ARCHITECTURES
from adasearch.sections import UnitsConfig
from tests import tiny

UNITS = ("kv_group", "head")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", UNITS)
def test_slices_cover_a_dimension_once(family, attention):
    config = tiny.tiny_config(family)
    structure, _ = tiny.tiny_structure(config, attention)
    shapes = models.shape_of(config).shapes
    seen = set()
    for group in structure.groups:
        for piece in group.slices:
            assert piece.parameter not in seen
            seen.add(piece.parameter)
            assert shapes[piece.parameter][piece.dim] == group.units * piece.block
    projections = {name for name in shapes if "_proj" in name}
    whole = {n for n in projections if attention == "head" and ("k_proj" in n or "v_proj" in n)}
    whole |= {n for n in projections if n.endswith(("o_proj.bias", "down_proj.bias"))}
    assert seen == projections - whole


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", UNITS)
@given(data=st.data())
def test_count_in_closed_form_is_the_number_of_elements(family, attention, data):
    config = tiny.tiny_config(family)
    structure, units = tiny.tiny_structure(config, attention)
    widths = {g.name: data.draw(st.integers(1, g.width)) for g in structure.groups}
    biases = data.draw(st.lists(st.sampled_from(sorted(structure.output_biases)), unique=True))
    plan = tiny.random_plan(structure, units, widths, biases=biases)
    model = surgery.skeleton(config, structure, plan)
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.parameters == structure.count(widths, structure.added(biases))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dense_counts(family):
    config = tiny.tiny_config(family, tie_word_embeddings=False)
    structure, _ = tiny.tiny_structure(config)
    model = models.empty_model(config)
    assert structure.parameters == sum(p.numel() for p in model.parameters()) == structure.count({})
    assert structure.embedding_parameters == 2 * config.vocab_size * config.hidden_size
    assert structure.dense_widths() == {g.name: {"mlp": 40, "attention": 3}[g.kind] for g in structure.groups}


def test_query_heads_form_one_partition_per_kv_group():
    structure, _ = tiny.tiny_structure(tiny.tiny_config(), "head")
    group = structure.group("model.layers.1.self_attn")
    assert (group.unit, group.units, group.partitions, group.width) == ("head", 6, 3, 2)
    assert group.unit_cost == 2 * 8 * 24
    assert group.step_cost == 3 * group.unit_cost
    assert group.output_block == 8


def test_units_coincide_without_grouped_queries():
    config = tiny.tiny_config(num_key_value_heads=6)
    by_head, _ = tiny.tiny_structure(config, "head")
    by_group, _ = tiny.tiny_structure(config, "kv_group")
    assert by_head == by_group


def test_biases_of_llama_are_cut_with_their_rows():
    config = tiny.tiny_config(attention_bias=True, mlp_bias=True)
    structure, _ = tiny.tiny_structure(config)
    sliced = {s.parameter for s in structure.group("model.layers.0.mlp").slices}
    assert {"model.layers.0.mlp.gate_proj.bias", "model.layers.0.mlp.up_proj.bias"} <= sliced
    assert "model.layers.0.mlp.down_proj.bias" not in sliced
    assert set(structure.output_biases.values()) == {0}
    assert structure.added(structure.output_biases) == {}


@pytest.mark.parametrize(("attention", "mlp", "kinds"), [("none", "channel", {"mlp"}), ("head", "none", {"attention"})])
def test_units_left_out(attention, mlp, kinds):
    structure, _ = tiny.tiny_structure(tiny.tiny_config(), attention, mlp)
    assert {g.kind for g in structure.groups} == kinds


def test_every_family_is_registered_under_its_file_name():
    assert ARCHITECTURES.names() == tuple(sorted(tiny.FAMILIES)) == architectures.supported()
    for name in ARCHITECTURES.names():
        assert ARCHITECTURES.get(name).facts["model_types"] == (name,)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("attention", UNITS)
@pytest.mark.parametrize("heads", [(12, 6), (8, 2), (6, 6)])
def test_stock_widths_are_those_that_the_config_class_accepts(family, attention, heads):
    query, groups = heads
    config = tiny.tiny_config(family, num_attention_heads=query, num_key_value_heads=groups)
    structure, _ = tiny.tiny_structure(config, attention)
    group = next(g for g in structure.groups if g.kind == "attention")
    for width in range(1, group.width):
        kept = width if group.partitions == 1 else groups
        numbers = {"num_attention_heads": query // group.width * width, "num_key_value_heads": kept, "head_dim": 8}
        try:
            type(config).from_dict({**config.to_dict(), **numbers})
            accepted = True
        except StrictDataclassError:
            accepted = False
        assert accepted == (width in structure.stock_widths.get("attention", (width,)))


def test_unsupported_family_names_the_supported_ones():
    shape = models.shape_of(tiny.tiny_config())
    fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    with pytest.raises(ModelError, match=r"llama, mistral, qwen2, qwen3.*'gpt9'"):
        architectures.describe(type(shape)(**{**fields, "family": "gpt9"}), UnitsConfig())


def test_lora_targets_are_projections_of_the_model():
    structure, _ = tiny.tiny_structure(tiny.tiny_config())
    names = {name for name, _ in models.empty_model(tiny.tiny_config()).named_modules()}
    assert all(any(name.endswith(f".{target}") for name in names) for target in structure.lora_targets)
    assert math.prod(len(t) for t in structure.lora_targets) > 0
