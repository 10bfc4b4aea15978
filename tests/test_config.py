"""Studies, spaces and recipes: defaults, merging, and clear errors before any weight is loaded."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from adasearch import errors
from adasearch.config import StudyConfig, TrialConfig, load_study, merged, study_from_dict
from adasearch.errors import ConfigError
from adasearch.library import FIRST, recipe_names

ROOT = Path(__file__).resolve().parent.parent

MINIMAL = {
    "model": {"name": "folder"},
    "space": {"calibration.samples": {"int": [8, 16]}},
    "budget": {"remove": 0.2},
    "objective": {"search": ["cloze/pydoc"]},
    "report": {"tasks": ["cloze/pydoc"]},
    "trial": {"calibration": {"corpus": "pydoc"}},
}


def study_of(**changes) -> StudyConfig:
    data = {**MINIMAL, **changes}
    return study_from_dict({k: v for k, v in data.items() if v is not None}, "s.yaml:", ROOT / "studies" / "s.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_study_in_the_project_reads(path):
    study = load_study(path)
    again = study_from_dict(study.to_dict(), "config.yaml:", path)
    assert again.to_dict() == study.to_dict()
    assert again.fingerprint == study.fingerprint


def test_defaults_are_filled_in():
    study = study_of()
    assert study.name == "s"
    assert study.cluster.workers == "auto"
    assert (study.finalize.recovery.type, study.finalize.recovery.options.rank) == ("lora", 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buget": {"remove": 0.2}}, "s.yaml: buget: unknown key 'buget'; did you mean 'budget'"),
        ({"budget": {"remove": 2}}, "s.yaml: budget.remove: "),
        ({"budget": None}, "s.yaml: budget: must be given"),
        ({"trials": 0}, "s.yaml: trials: "),
        ({"trials": "many"}, "s.yaml: trials: "),
        ({"name": "../x"}, "s.yaml: name: "),
        ({"space": "quikstart"}, "s.yaml: space: no file for 'quikstart'; did you mean 'quickstart'"),
        ({"recipes": ["flapp"]}, "s.yaml: recipes: no file for 'flapp'; did you mean 'flap'"),
        ({"recipes": "flap"}, "s.yaml: recipes: must be auto, none, or a list of names, given 'flap'"),
        ({"recipes": 3}, "s.yaml: recipes: must be auto, none, or a list of names, given 3"),
        ({"trial": {"importance": "tailor"}}, "s.yaml: trial.importance.type: unknown importance criterion 'tailor'"),
        (
            {"trial": {"recovery": {"type": "lora", "rnk": 3}}},
            "s.yaml: trial.recovery.rnk: unknown key 'rnk'; did you mean 'rank'",
        ),
        ({"trial": {"recovry": {}}}, "s.yaml: trial.recovry: unknown key 'recovry'; did you mean 'recovery'"),
        ({"finalize": {"recovery": {"type": "ful"}}}, "s.yaml: finalize.recovery.type: unknown recovery 'ful'"),
        ({"finalize": {"formats": ["onnx"]}}, "s.yaml: finalize.formats.type: unknown export format 'onnx'"),
        ({"finalize": {"formats": "hf"}}, "s.yaml: finalize.formats: must be a list of formats, given 'hf'"),
        (
            {"finalize": {"formats": ["hf", {"type": "hf", "shard": "1GB"}]}},
            "s.yaml: finalize.formats: hf stands twice",
        ),
        (
            {"finalize": {"formats": [{"type": "gguf", "dtype": "q9"}]}},
            "s.yaml: finalize.formats.dtype: input",
        ),
        (
            {"finalize": {"formats": [{"type": "hf", "shard": "5"}]}},
            "s.yaml: finalize.formats.shard: string",
        ),
        ({"racing": {"rungs": [0.5, 3]}}, "s.yaml: racing.rungs.1: "),
        ({"racing": {"control": 1.5}}, "s.yaml: racing.control: "),
        ({"fidelity": {"divergance": 64}}, "s.yaml: fidelity.divergance: unknown key 'divergance'; did you mean 'div"),
        ({"fidelity": {"unrecovered": -0.1}}, "s.yaml: fidelity.unrecovered: "),
    ],
)
def test_wrong_studies_name_file_and_key(changes, message):
    with pytest.raises(ConfigError) as caught:
        study_of(**changes)
    assert message in str(caught.value)


def test_recipes_left_open_are_all_there_are_in_their_order():
    study = study_of()
    assert study.all_recipes
    assert list(study.recipes) == list(recipe_names(ROOT / "studies" / "s.yaml"))
    assert study_of(recipes="auto") == study
    again = study_from_dict(study.to_dict(), "config.yaml:", Path("elsewhere/config.yaml"))
    assert (again.recipes, again.all_recipes) == (study.recipes, True)
    for none in ([], "none"):
        assert (study_of(recipes=none).recipes, study_of(recipes=none).all_recipes) == ({}, False)
    named = study_of(recipes=["fasp", "flap"])
    assert (list(named.recipes), named.all_recipes) == (["fasp", "flap"], False)


def test_the_order_of_recipes_names_recipes_and_ends_with_the_alphabet():
    names = recipe_names(ROOT / "studies" / "s.yaml")
    assert names[: len(FIRST)] == FIRST
    assert list(names[len(FIRST) :]) == sorted(names[len(FIRST) :])
    assert set(names) == {path.stem for path in (ROOT / "search_spaces" / "recipes").glob("*.yaml")}


def test_the_data_root_comes_from_the_environment(monkeypatch, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.setenv("ADASEARCH_DATA_ROOT", "/somewhere")
    assert load_study(path).data_root == "/somewhere"
    monkeypatch.delenv("ADASEARCH_DATA_ROOT")
    assert load_study(path).data_root is None


def test_what_may_change_on_resume_is_not_in_the_fingerprint():
    study = study_of()
    assert study_of(trials=3, cluster={"workers": 5}, limits={"trial_seconds": 1}).fingerprint == study.fingerprint
    assert study_of(seed=3).fingerprint != study.fingerprint
    assert study_of(budget={"remove": 0.3}).fingerprint != study.fingerprint


def test_a_trial_turns_into_a_mapping_and_back():
    config = TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, "importance": {"type": "taylor"}}, "t")
    again = TrialConfig.from_dict(config.to_dict(), "t")
    assert again == config
    assert again.key == config.key
    assert pickle.loads(pickle.dumps(config)) == config


def test_merging_replaces_a_component_of_another_type_whole():
    base = {"recovery": {"type": "lora", "rank": 8}, "calibration": {"corpus": "a", "samples": 3}}
    assert merged(base, {"recovery": {"rank": 4}})["recovery"] == {"type": "lora", "rank": 4}
    assert merged(base, {"recovery": {"type": "none"}})["recovery"] == {"type": "none"}
    assert merged(base, {"calibration": {"samples": 4}})["calibration"] == {"corpus": "a", "samples": 4}


@pytest.mark.parametrize(
    "error",
    [errors.ConfigError("a.yaml: b", "must hold"), errors.TrialError("nan", "loss", "recover"), errors.DataError("x")],
)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert type(again) is type(error)
    assert again.exit_code == error.exit_code
