"""What can be found out about a study without weights: ratios by layer, and what proposes its trials."""

from __future__ import annotations

import math

import pytest

from adasearch import checks
from adasearch.config import study_from_dict
from adasearch.errors import ConfigError
from adasearch.library import REPOSITORY
from adasearch.search.samplers import choose
from adasearch.search.space import Space

BASE = {
    "model": {"name": "none"},
    "space": {"calibration.samples": {"int": [4, 8]}},
    "budget": {"remove": 0.2},
    "objective": {"search": ["cloze/pydoc"]},
    "report": {"tasks": ["cloze/pydoc"]},
    "trial": {"calibration": {"corpus": "pydoc"}},
    "recipes": "none",
}


def study_of(**changes):
    return study_from_dict({**BASE, **changes}, "study.yaml:", REPOSITORY / "studies" / "any.yaml")


def space_of(study):
    return Space.from_config(study.space, study.trial, seed=study.seed)


def levels(layers, **more):
    return {"layer_levels": {"layers": layers, **more}}


FREE = {"allocation": {"choice": ["free_ratios", "uniform"]}, "calibration.samples": {"int": [4, 8]}}


@pytest.mark.parametrize(("changes", "where"), [
    ({"space": {**FREE, "allocation.free_ratios": levels(28)}}, "space.allocation.free_ratios.mlp"),
    ({"space": {"calibration.samples": {"int": [4, 8]}}, "trial": {**BASE["trial"], "allocation": {
        "type": "free_ratios", "attention": [1.0] * 28}}}, "trial.allocation.attention"),
    ({"space": {"importance": {"choice": ["obs"]}}, "recipes": {"mine": {"allocation": {
        "type": "free_ratios", "mlp": [1.0] * 28}}}}, "recipes.mine.allocation.mlp"),
])  # fmt: skip
def test_ratios_by_layer_are_those_of_the_model(changes, where):
    study = study_of(**changes)
    checks._check_layers(study, space_of(study), 28, "study.yaml:")
    with pytest.raises(ConfigError, match="each of the model's 30 layers, given 28") as caught:
        checks._check_layers(study, space_of(study), 30, "study.yaml:")
    assert caught.value.where == f"study.yaml: {where}"


def test_the_space_of_free_ratios_is_that_of_smollm2_and_holds_recipes():
    study = study_of(space="free", recipes="auto", trials=80)
    space = space_of(study)
    checks._check_layers(study, space, 30, "study.yaml:")
    assert sum(name.startswith("allocation.free_ratios.") for name in space.parameters) == 60
    assert math.isinf(space.num_points)
    assert choose(study, space).type == "botorch"
    held = {name for name, recipe in study.recipes.items() if space.encode({**study.trial, **recipe})}
    assert held >= {"flap", "fasp", "llm_pruner_e1"}


def test_a_recipe_of_free_ratios_is_a_point_of_the_levels():
    study = study_of(space={**FREE, "allocation.free_ratios": levels(3, levels=5)})
    space = space_of(study)
    config = {**study.trial, "allocation": {"type": "free_ratios", "mlp": [0.0, 0.25, 1.0], "attention": [0.5] * 3}}
    params = space.encode({**config, "calibration": {"corpus": "pydoc", "samples": 4}})
    assert [params[f"allocation.free_ratios.mlp.{i}"] for i in range(3)] == [0, 1, 4]
    assert "none of 5 levels" in space.obstacle({**study.trial, "allocation": {
        "type": "free_ratios", "mlp": [0.3] * 3, "attention": [0.5] * 3}})  # fmt: skip
    assert space.encode({**study.trial, "allocation": "free_ratios"}) is not None
