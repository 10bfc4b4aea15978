"""Several objectives and budgets of trials, from the study file to the report, on a tiny model."""

import dataclasses

import optuna
import pandas as pd
import pytest

from adasearch.checks import check_study
from adasearch.cli import main
from adasearch.config import TrialConfig, load_study, merged
from adasearch.errors import ConfigError
from adasearch.records import DENSE, read_finals, read_records
from adasearch.search.seeds import find_seeds
from adasearch.search.space import Space
from tests.test_main_job import study_file

SPACE = {"budget.remove": {"float": [0.1, 0.5]}, "importance": {"choice": ["wanda_sp", "taylor", "flap"]}}
SEARCH = {"search": ["cloze/pydoc"], "items": 4, "select": 4, "latency_tokens": 32}
COSTS = {"also": ["parameters", "latency"], "at_most": {"memory": 0.85}}


def path_of(folder, checkpoint, objective=None, **changes):
    changes = {
        "space": SPACE,
        "recipes": {"plain": {"importance": "taylor"}},
        "trials": 4,
        "fidelity": {"divergence": 0},
        **changes,
    }
    recovery = {"type": "none"}
    trial = {"calibration": {"corpus": "pydoc", "length": 32, "samples": 2}, "recovery": recovery}
    finalize = {"top": 2, "recovery": recovery, "formats": []}
    return study_file(
        folder, str(checkpoint), objective={**SEARCH, **(objective or {})}, trial=trial, finalize=finalize, **changes
    )


def checked(path):
    return check_study(load_study(path), f"{path}:")


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ({"also": ["latency", "memory", "latency"]}, {}, "objective.also: .*latency stands twice"),
        ({"also": ["flops"]}, {}, "objective.also.0: "),
        ({"at_most": {"parameters": 0}}, {}, "objective.at_most.parameters: .*greater than 0"),
        ({"at_most": {"latency": -1}}, {}, "objective.at_most.latency: .*greater than 0"),
        ({"at_most": {"parameters": 0.3}}, {}, "objective.at_most.parameters: no trial can meet 0.3: removing 0.5"),
        ({"at_most": {"memory": 0.1}}, {}, "objective.at_most.memory: no trial can meet 0.1"),
        (
            {"at_most": {"parameters": 0.7}},
            {"space": {"importance": {"choice": ["wanda_sp"]}}},
            "objective.at_most.parameters: no trial can meet 0.7: removing 0.2",
        ),
        ({"also": ["latency"]}, {"sampler": {"type": "cmaes"}}, "sampler.type: must be one of auto"),
        ({"also": ["latency"]}, {"sampler": {"type": "evolution"}}, "sampler.type: must be one of auto"),
        ({}, {"space": {"budget.remove": {"float": [0.1, 0.99]}}}, "space.budget.remove: must be at most"),
        ({}, {"space": {"budget.remove": {"float": [0.1, 1.5]}}}, "space.budget.remove: "),
        ({}, {"space": {"budget.of": {"choice": ["all"]}}}, "space.budget.of: unknown key 'of' of budget"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_work(tmp_path, tiny_checkpoint, objective, changes, message):
    with pytest.raises(ConfigError, match=message):
        checked(path_of(tmp_path, tiny_checkpoint, objective, **changes))


@pytest.mark.parametrize("sampler", ["gp", "tpe", "botorch", "nsga2", "random", "auto"])
def test_samplers_of_several_objectives_are_accepted(tmp_path, tiny_checkpoint, sampler):
    found = checked(path_of(tmp_path, tiny_checkpoint, COSTS, sampler={"type": sampler}))
    assert found.smallest < found.target < found.structure.parameters
    assert f"down to {found.target:,} to {found.smallest:,}" in found.summary


def test_equal_configurations_have_equal_keys_with_and_without_a_word_on_the_budget():
    plain = {"calibration": {"corpus": "pydoc"}}
    bare, said = (TrialConfig.from_dict(data, "trial") for data in (plain, {**plain, "budget": {"remove": None}}))
    assert bare == said
    assert bare.key == said.key == "e82064a8fe3ab375"
    other = TrialConfig.from_dict({**plain, "budget": {"remove": 0.3}}, "trial")
    assert other.key != bare.key
    assert TrialConfig.from_dict(other.to_dict(), "trial") == other


@pytest.mark.parametrize(("domain", "remove"), [([0.1, 0.5], 0.2), ([0.3, 0.5], 0.4)])
def test_seeds_lie_at_the_studys_budget_or_in_the_middle(tmp_path, tiny_checkpoint, domain, remove):
    study = load_study(path_of(tmp_path, tiny_checkpoint, space={**SPACE, "budget.remove": {"float": domain}}))
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    (seed,) = find_seeds(study, space).recipes
    assert space.decode(seed.params).budget.remove == pytest.approx(remove)
    own = merged(study.trial, {"importance": "wanda_sp", "budget": {"remove": 0.45}})
    assert space.encode(own)["budget.remove"] == 0.45
    assert space.encode(merged(own, {"budget": {"remove": 0.6}})) is None


def test_a_recipe_with_a_budget_of_its_own_is_no_point_of_a_space_without(tmp_path, tiny_checkpoint):
    study = load_study(path_of(tmp_path, tiny_checkpoint, space={"importance": SPACE["importance"]}))
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    config = merged(study.trial, {"importance": "taylor"})
    assert space.encode(config) is not None
    assert space.encode({**config, "budget": {"remove": 0.3}}) is None
    trial = TrialConfig.from_dict({**config, "budget": {"remove": 0.3}}, "trial")
    assert study.budget_of(trial) == dataclasses.replace(study.budget, remove=0.3)
    assert study.budget_of(TrialConfig.from_dict(config, "trial")) is study.budget


def test_a_search_for_a_front_from_file_to_report(tmp_path, tiny_checkpoint, capsys):
    path = path_of(tmp_path, tiny_checkpoint, COSTS, sampler={"type": "botorch", "startup": 2})
    run = tmp_path / "run"
    assert main(["validate", str(path)]) == 0
    said = capsys.readouterr().out
    assert "objectives: margin up; parameters, latency down" in said
    assert "no trial races" in said
    assert "hard limits: memory 0.85" in said
    assert main(["run", str(path), "--out", str(run)]) == 0
    assert "front: " in capsys.readouterr().out
    records = {r.number: r for r in read_records(run)}
    assert records[DENSE].result.shares == {"parameters": 1.0, "latency": 1.0, "memory": 1.0}
    removed = [1 - records[n].result.shares["parameters"] for n in range(4)]
    asked = [records[n].config["budget"]["remove"] for n in range(4)]
    assert asked[0] == 0.2
    assert len(set(asked)) == 4
    assert all(0 <= has - want < 0.08 for has, want in zip(removed, asked, strict=True))
    kept = {n for n in range(4) if records[n].result.shares["memory"] <= 0.85}
    assert len(kept) > 0
    assert {f.trial for f in read_finals(run) if f.role == "finalist"} <= kept
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run / 'study.db'}")
    assert len(study.directions) == 3
    table = pd.read_csv(run / "leaderboard.csv")
    assert {"latency", "latency_share", "memory", "memory_share", "admitted", "front"} <= set(table.columns)
    assert table["front"].eq(True).any()
    assert 'id="front"' in (run / "report.html").read_text()
    assert main(["rebuild", str(run)]) == 0
    assert main(["status", str(run)]) == 0
