"""Plans hold what the widths say, and survive the disk."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import ModelError, TrialError
from adasearch.pruning.plan import PruningPlan, check_plan, make_plan
from tests import tiny

MLP = "model.layers.0.mlp"


def _case(data, attention):
    structure, units = tiny.tiny_structure(tiny.tiny_config(), attention)
    widths = {g.name: data.draw(st.integers(1, g.width)) for g in structure.groups}
    scores = {g.name: torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=g.units, max_size=g.units))).float()
              for g in structure.groups}  # fmt: skip
    biases = data.draw(st.lists(st.sampled_from(sorted(structure.output_biases)), unique=True))
    return structure, units, scores, widths, biases


@pytest.mark.parametrize("attention", ["kv_group", "head"])
@given(data=st.data())
def test_kept_units_are_the_best_of_their_partition(attention, data):
    structure, units, scores, widths, biases = _case(data, attention)
    plan = make_plan(structure, units, scores, widths, biases)
    check_plan(plan, structure)
    assert plan.widths(structure) == widths
    assert plan.biases == tuple(sorted(biases))
    for group in structure.groups:
        keep = plan.keep[group.name]
        assert list(keep) == sorted(set(keep))
        for part in range(group.partitions):
            mine = range(part * group.width, (part + 1) * group.width)
            kept = [u for u in mine if u in keep]
            gone = [u for u in mine if u not in keep]
            assert len(kept) == widths[group.name]
            values = scores[group.name]
            assert not gone or max(float(values[u]) for u in gone) <= min(float(values[u]) for u in kept)


@given(data=st.data())
def test_save_then_load_is_identity(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = make_plan(*_case(data, "head"))
    plan.save(path)
    assert PruningPlan.load(path) == plan


def test_groups_left_out_stay_dense_and_need_no_scores():
    structure, units = tiny.tiny_structure(tiny.tiny_config())
    plan = make_plan(structure, units, {}, {})
    assert plan.parameters == plan.dense_parameters == structure.parameters
    assert plan.removed == 0
    assert plan.widths(structure) == structure.dense_widths()


def test_of_equal_scores_the_first_units_stay():
    structure, units = tiny.tiny_structure(tiny.tiny_config())
    plan = make_plan(structure, units, {MLP: torch.zeros(40)}, {MLP: 3})
    assert plan.keep[MLP] == (0, 1, 2)


def test_bad_input_is_refused():
    structure, units = tiny.tiny_structure(tiny.tiny_config())
    with pytest.raises(TrialError, match="finite, 1 are not"):
        make_plan(structure, units, {MLP: torch.tensor([float("nan")] + [0.0] * 39)}, {MLP: 3})
    with pytest.raises(ModelError, match=r"one per unit, 40, given shape \(3,\)"):
        make_plan(structure, units, {MLP: torch.zeros(3)}, {MLP: 3})
    with pytest.raises(ModelError, match="from 1 to 40, given 0"):
        make_plan(structure, units, {MLP: torch.zeros(40)}, {MLP: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {"family": "qwen3"}, "family must be that of the model, 'llama', given 'qwen3'"),
        (lambda p: {"keep": {MLP: (0,)}}, "groups must be"),
        (lambda p: {"dense_parameters": 7}, "dense parameters"),
        (lambda p: {"parameters": 7}, "as the kept units say, given 7"),
        (lambda p: {"biases": ("nowhere",)}, "'nowhere'"),
        (lambda p: {"keep": {**p.keep, MLP: (1, 0)}}, "ascending order"),
        (lambda p: {"keep": {**p.keep, MLP: (0, 40)}}, "ascending order"),
        (lambda p: {"keep": {**p.keep, MLP: ()}}, "ascending order"),
        (lambda p: {"keep": {**p.keep, "model.layers.0.self_attn": (0, 1, 2)}}, "equally many"),
    ],
)
def test_plan_of_another_model_is_refused(change, message):
    structure, units = tiny.tiny_structure(tiny.tiny_config(), "head")
    plan = make_plan(structure, units, {}, {})
    with pytest.raises(ModelError, match=message):
        check_plan(dataclasses.replace(plan, **change(plan)), structure)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 9}', '{"schema": 1}', "null"])
def test_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"plan\.json"):
        PruningPlan.load(path)


def test_unknown_key_in_a_file_is_refused(tmp_path):
    structure, units = tiny.tiny_structure(tiny.tiny_config())
    path = tmp_path / "plan.json"
    make_plan(structure, units, {}, {}).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "keeep": {}}))
    with pytest.raises(ModelError, match="keeep"):
        PruningPlan.load(path)
