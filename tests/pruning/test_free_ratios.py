"""Free ratios: what the levels of a search mean for widths, on structures of numbers alone."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.config import Component
from adasearch.errors import ConfigError
from adasearch.pruning import allocation
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.allocation.free_ratios import FreeRatiosOptions
from adasearch.pruning.projection import project
from adasearch.pruning.structure import Outline
from tests.pruning.sample import budget, made_structure


def ratios_of(structure, asked=None, **options):
    context = AllocationContext(
        structure=structure, budget=asked or budget(0.2), scores={}, statistics=None, weights={}
    )
    return allocation.shape(context, Component(type="free_ratios", options=FreeRatiosOptions(**options)))


def names(kind, layers):
    return [f"model.layers.{layer}.{'mlp' if kind == 'mlp' else 'self_attn'}" for layer in range(layers)]


def test_each_layer_has_its_own_ratio_and_the_scale_is_free():
    structure = made_structure(3)
    found = ratios_of(structure, mlp=(1.0, 2.0, 4.0), attention=(4.0, 1.0, 0.0))
    assert [found[name] for name in names("mlp", 3)] == [0.25, 0.5, 1.0]
    assert [found[name] for name in names("attention", 3)] == [1.0, 0.25, 1e-6]
    assert found == ratios_of(structure, mlp=(3.0, 6.0, 12.0), attention=(12.0, 3.0, 0.0))


def test_what_is_left_open_is_uniform():
    structure = made_structure(3)
    assert set(ratios_of(structure).values()) == {1.0}
    assert set(ratios_of(structure, mlp=(0.0,) * 3, attention=(0.0,) * 3).values()) == {1.0}
    found = ratios_of(structure, mlp=(0.0, 0.5, 1.0))
    assert [found[name] for name in names("attention", 3)] == [0.5] * 3
    found = ratios_of(structure, attention=(0.0, 0.5, 1.0))
    assert [found[name] for name in names("mlp", 3)] == [0.5] * 3


def test_a_layer_of_ratio_zero_stays_dense_while_others_can_pay():
    structure, asked = made_structure(6, channels=400, head_cost=40), budget(0.2)
    widths = project(structure, ratios_of(structure, mlp=(0, 1, 1, 1, 1, 1), attention=(0,) * 6), asked)
    assert widths["model.layers.0.mlp"] == 400
    assert [widths[name] for name in names("attention", 6)] == [3] * 6
    assert len({widths[name] for name in names("mlp", 6)[1:]}) <= 2


@given(levels=st.lists(st.integers(0, 7), min_size=12, max_size=12), remove=st.floats(0.05, 0.6))
def test_all_levels_meet_the_budget(levels, remove):
    structure, asked = made_structure(6), budget(remove)
    ratios = ratios_of(structure, asked, mlp=tuple(levels[:6]), attention=tuple(levels[6:]))
    left = structure.count(project(structure, ratios, asked))
    assert 0 <= (1 - remove) * structure.parameters - left < 30


def test_one_step_up_and_one_down_keep_the_widths_of_the_others():
    structure, asked = made_structure(8, channels=800, head_cost=10), budget(0.25)
    before = project(structure, ratios_of(structure, mlp=(4,) * 8, attention=(0,) * 8), asked)
    after = project(structure, ratios_of(structure, mlp=(4, 5, 4, 4, 3, 4, 4, 4), attention=(0,) * 8), asked)
    moved = {name: after[name] - before[name] for name in names("mlp", 8)}
    assert moved["model.layers.1.mlp"] < -40 < 40 < moved["model.layers.4.mlp"]
    assert all(abs(moved[name]) <= 1 for i, name in enumerate(names("mlp", 8)) if i not in {1, 4})


def test_the_number_of_values_is_that_of_the_dense_model():
    structure = made_structure(3)
    with pytest.raises(ConfigError, match="each of the model's 3 layers, given 2") as caught:
        ratios_of(structure, mlp=(1.0, 2.0))
    assert caught.value.where == "allocation.free_ratios.mlp"
    with pytest.raises(ConfigError, match="given 4"):
        ratios_of(structure, mlp=(1.0,) * 3, attention=(1.0,) * 4)


def test_layers_that_are_left_keep_their_ratios():
    dense, gone = made_structure(3), ("model.layers.1.self_attn", "model.layers.1.mlp")
    left = dataclasses.replace(made_structure(2), outline=Outline(gone=gone), origin=dense)
    found = ratios_of(left, mlp=(1.0, 2.0, 4.0), attention=(1.0, 1.0, 1.0))
    assert [found[name] for name in names("mlp", 2)] == [0.25, 1.0]
