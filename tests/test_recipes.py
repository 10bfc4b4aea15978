"""Every recipe is a valid, different point of the vocabulary, says where it comes from and how close it is."""

import pytest

from adasearch.config import REPOSITORY, TrialConfig, load_recipe
from adasearch.documents import read_yaml

FOLDER = REPOSITORY / "search_spaces" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def parsed(name):
    recipe = load_recipe(name, REPOSITORY / "studies" / "any.yaml", "recipes")
    return TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, **recipe}, f"{name}.yaml:")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_a_trial_and_leaves_calibration_and_recovery_to_the_study(name):
    recipe = load_recipe(name, REPOSITORY / "studies" / "any.yaml", "recipes")
    assert set(recipe) - {"selection"} == {"units", "importance", "allocation", "compensation"}
    config = parsed(name)
    assert TrialConfig.from_dict(config.to_dict(), "again") == config


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_what_it_is(name):
    data = read_yaml(FOLDER / f"{name}.yaml")
    assert all(isinstance(data[key], str) and data[key] for key in ("title", "source", "fidelity"))
    level, _, difference = data["fidelity"].partition(": ")
    assert level in {"exact", "formula", "approximate"}
    assert difference
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"the table in README.md must have one row for {name}"
    assert rows[0].split("|")[5].strip() == level


def test_recipes_differ():
    keys = {parsed(name).key: name for name in NAMES}
    assert len(keys) == len(NAMES) >= 9
