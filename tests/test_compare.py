"""`adasearch compare`: recipes under one harness on a tiny random model, resumed, damaged and refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from adasearch import comparison, comparison_html, pictures, text_checks
from adasearch.checks import check_study, place
from adasearch.cli import main
from adasearch.config import load_study
from adasearch.errors import ConfigError
from adasearch.library import recipe_names
from adasearch.placement import Machine
from adasearch.records import read_failures, read_finals, read_items, write_json
from adasearch.run import load_run
from adasearch.sections import TrainingRules
from tests.test_main_job import ROOT, study_file
from tests.test_report import read

RECIPES = "wanda_sp,flap,heads_only,llm_pruner_e1,unrecovered"
OWN = {
    "heads_only": {"units": {"attention": "kv_group", "mlp": "none"}, "importance": "wanda_sp"},
    "unrecovered": {"importance": "wanda_sp", "allocation": {"type": "layer_profile"}, "recovery": "none"},
}
REPORT = {"tasks": ["cloze/pydoc"], "items": 24, "perplexity": ["pydoc"], "perplexity_tokens": 1024}


def compare_file(folder: Path, checkpoint: Path, **changes) -> Path:
    """Write a study whose budget attention alone cannot meet (6,912 of 19,008 parameters, of which a third stays)."""
    parts = {"budget": {"remove": 0.3}, "recipes": OWN, "report": {**REPORT, "windows": [128, 256]}}
    return study_file(folder, str(checkpoint), **{**parts, **changes})


def compare(path: Path, run: Path, recipes: str | None = RECIPES) -> int:
    return main(["compare", str(path), "--out", str(run), *(["--recipes", recipes] if recipes is not None else [])])


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def times(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.glob("final/*.json")}


def results(run: Path) -> dict[str, tuple]:
    return {f.name: (f.report, f.perplexity, f.parameters, f.losses) for f in read_finals(run)}


@pytest.fixture(scope="module")
def study_path(tiny_checkpoint, tmp_path_factory) -> Path:
    return compare_file(tmp_path_factory.mktemp("compare"), tiny_checkpoint)


@pytest.fixture(scope="module")
def compared(study_path) -> Path:
    """Run folder of a comparison of five recipes, two of which cannot be made."""
    run = study_path.parent / "run"
    assert compare(study_path, run) == 0
    return run


@pytest.fixture
def copied(compared, tmp_path) -> Path:
    return Path(shutil.copytree(compared, tmp_path / "run"))


def test_the_leaderboard_begins_with_the_dense_model_and_ends_with_reasons(compared):
    rows = rows_of(compared)
    assert [rows[0][key] for key in ("recipe", "rank", "removed")] == ["dense", "", "0"]
    assert {row["recipe"] for row in rows[1:4]} == {"wanda_sp", "flap", "unrecovered"}
    assert [row["rank"] for row in rows[1:]] == ["1", "2", "3", "", ""]
    scores = [float(row["score"]) for row in rows[1:4]]
    assert scores == sorted(scores, reverse=True)
    reasons = {row["recipe"]: row["reason"] for row in rows[4:]}
    assert all(row["state"] == "failed" and row["score"] == "" for row in rows[4:])
    assert "budget.remove: must be at most" in reasons["heads_only"]
    assert "must leave some of the 2 layers" in reasons["llm_pruner_e1"]
    failures = {name.rpartition("-")[0]: failure for name, failure in read_failures(compared).items()}
    assert {name: failure.phase for name, failure in failures.items()} == {
        "heads_only": "plan",
        "llm_pruner_e1": "plan",
    }


def test_every_row_meets_the_budget_and_says_what_it_cost(compared, study_path):
    target = check_study(load_study(study_path), "study:").target
    for row in rows_of(compared)[1:4]:
        assert target - 3 * 24 < int(row["parameters"]) <= target
        assert float(row["seconds"]) > float(row["pruning_seconds"]) > 0
        assert float(row["recovery_seconds"]) >= 0
        assert 2**26 < int(row["peak_bytes"]) < 2**36
        assert float(row["perplexity pydoc@128"]) > 1
        assert float(row["perplexity pydoc@256"]) > 1
    assert {f.recipe: bool(f.losses) for f in read_finals(compared) if f.recipe} == {
        "wanda_sp": True,
        "flap": True,
        "unrecovered": False,
    }


def test_scores_and_differences_follow_from_the_items(compared):
    rows = {row["recipe"]: row for row in rows_of(compared)}
    items = {}
    for final in read_finals(compared):
        found = read_items(compared / "final" / final.name)
        assert found is not None
        items[final.recipe or "dense"] = found["cloze/pydoc#acc"]
        assert float(rows[final.recipe or "dense"]["score"]) == pytest.approx(
            items[final.recipe or "dense"].mean(), rel=1e-5
        )
        assert float(rows[final.recipe or "dense"]["cloze/pydoc"]) == pytest.approx(final.report[0].acc_norm, rel=1e-5)
    best = next(row for row in rows.values() if row["rank"] == "1")
    assert best["to_best"] == ""
    for name in items.keys() - {best["recipe"]}:
        gaps = items[name] - items[best["recipe"]]
        row = rows[name]
        assert float(row["to_best"]) == pytest.approx(gaps.mean(), abs=1e-6)
        half = 1.96 * gaps.std() / np.sqrt(len(gaps))
        width = float(row["to_best_high"]) - float(row["to_best_low"])
        assert width == pytest.approx(2 * half, abs=0.09), "the interval is that of the paired items"
        assert float(row["retained"]) == pytest.approx(items[name].mean() / items["dense"].mean(), rel=1e-4)


def test_all_recipes_are_treated_alike_but_for_what_they_fix(study_path):
    study = comparison.with_recipes(load_study(study_path), RECIPES.split(","), study_path)
    dense, *tasks = comparison.tasks_of(study)
    assert (dense.role, dense.config, dense.items) == ("dense", None, ("report",))
    assert [task.recipe for task in tasks] == RECIPES.split(",")
    samples = [task.config["calibration"] for task in tasks]
    assert all(sample == samples[0] for sample in samples)
    assert {task.recipe: task.recovery.type for task in tasks} == {
        **dict.fromkeys(RECIPES.split(","), "lora"),
        "unrecovered": "none",
    }
    assert {task.config["seed"] for task in tasks} == {study.seed}
    assert all(not task.formats and task.items == ("report",) for task in tasks)
    assert pickle.loads(pickle.dumps(tasks)) == tasks, "tasks go to other processes"
    found = comparison.gather(study_path.parent / "nowhere", study)
    assert {row.name: row.own for row in found.rows if row.own} == {"unrecovered": ("recovery",)}
    assert {row.state for row in found.rows} == {"waiting"}


def test_recoveries_are_run_as_those_of_finalists_but_for_how_long(tmp_path, tiny_checkpoint):
    """So that what fits at the end of a search fits in a comparison too."""
    own = {"whole": {"importance": "flap", "recovery": {"type": "full", "batch": 8, "length": 64}}, **OWN}
    how = {"micro_batch": 1, "recompute": True, "optimizer": "adamw8bit"}
    training = {"seconds": 9, "validation": {}, **how}
    path = compare_file(tmp_path, tiny_checkpoint, recipes=own, finalize={"recovery": "full", "training": training})
    study = comparison.with_recipes(load_study(path), list(own), path)
    _, *tasks = comparison.tasks_of(study)
    assert {task.rules for task in tasks} == {TrainingRules(**how)}
    found = comparison.trained(study)
    assert [training.rank for training in found] == [0, 8], "one recipe has a recovery of its own, one has none"
    assert found[0].tokens == 64
    shape, machine = check_study(study, "s:").shape, Machine(cores=4, memory=8 << 30)
    needs = [place(study, shape, (machine,), trained=part, most=4).need.memory for part in (found[1:], found)]
    assert needs[0] < needs[1], "the hungriest recipe decides"


def test_what_a_record_stands_for_is_in_its_name(study_path, tmp_path, tiny_checkpoint):
    def names(path: Path) -> set[str]:
        return {task.name for task in comparison.tasks_of(comparison.with_recipes(load_study(path), ["flap"], path))}

    same = names(compare_file(tmp_path, tiny_checkpoint, trials=9))
    assert names(study_path) == same
    trial = {"calibration": {"corpus": "pydoc", "length": 64, "samples": 3}}
    assert names(compare_file(tmp_path, tiny_checkpoint, trial=trial)) & same == {"dense"}


def test_without_names_all_recipes_are_compared(study_path):
    study = comparison.with_recipes(load_study(study_path), None, study_path)
    assert list(study.recipes) == [*recipe_names(study_path), *OWN]
    assert {"flap", "wanda_sp"} <= study.recipes.keys()


def test_what_is_recorded_is_not_repeated_and_what_is_lost_comes_back_the_same(copied, study_path):
    before, stamps = results(copied), times(copied)
    lost = next(copied.glob("final/flap-*.json"))
    lost.unlink()
    assert compare(study_path, copied) == 0
    assert results(copied) == before
    assert {name for name, stamp in times(copied).items() if stamps[name] != stamp} == {lost.name}


def test_other_recipes_join_without_repeating_the_first(copied, study_path, capsys):
    stamps = times(copied)
    assert compare(study_path, copied, "wanda_sp,random") == 0
    assert {row["recipe"] for row in rows_of(copied)} == {"dense", "wanda_sp", "random"}
    assert {name: times(copied)[name] for name in stamps} == stamps
    out = capsys.readouterr().out
    assert "[1/1] random: scored" in out
    assert list(load_run(copied).recipes) == ["wanda_sp", "random"]


def test_a_killed_comparison_goes_on_where_it_was(compared, study_path, tmp_path):
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "adasearch.cli", "compare", str(study_path), "--out", str(run)]
    process = subprocess.Popen(
        [*command, "--recipes", RECIPES], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 240
    while len(times(run)) < 2 and process.poll() is None:
        assert time.monotonic() < limit, "the comparison did not get to its first recipe"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = times(run)
    assert compare(study_path, run) == 0
    assert {name: times(run)[name] for name in kept} == kept
    assert results(run) == results(compared)


def test_one_driver_at_a_time(copied, study_path, capsys):
    (copied / "lease.json").write_text(json.dumps({"host": "another", "pid": 1}))
    assert compare(study_path, copied) == 4
    assert "the run is held by process 1 on host another" in capsys.readouterr().err


def test_status_and_report_know_a_comparison(copied, capsys):
    board = (copied / "leaderboard.csv").read_bytes()
    (copied / "leaderboard.csv").unlink()
    assert main(["report", str(copied)]) == 0
    assert (copied / "leaderboard.csv").read_bytes() == board
    assert main(["status", str(copied)]) == 0
    head, dense, *rest = capsys.readouterr().out.splitlines()[1:]
    assert "to the best" in head
    assert "pydoc@128" in head
    assert dense.split()[0] == "dense"
    assert rest[0].split()[0] == "1"
    assert any(line.startswith("heads_only: failed: config: budget.remove") for line in rest)


def test_the_page_says_everything_and_that_choosing_by_it_is_a_selection(compared):
    source, text = read(compared / "report.html")
    assert "<svg" in source
    assert "Nothing was chosen by these items" in text
    for words in ("wanda_sp", "flap", "own recovery", "pydoc@128", "pydoc@256", "must leave some of the 2 layers"):
        assert words in text
    assert "--recipe" in text
    assert str(compared.parent) not in text


def test_names_and_reasons_are_escaped(compared):
    found = comparison.gather(compared, load_run(compared))
    evil = "<script>alert('x')</script>\"&"
    failed = found.rows[-1]
    assert failed.failure is not None
    broken = dataclasses.replace(failed, name=evil, failure=dataclasses.replace(failed.failure, message=evil))
    page = comparison_html.page(
        dataclasses.replace(found, rows=(dataclasses.replace(found.rows[0], name=evil), broken))
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_the_picture_places_scores_in_the_order_given():
    rows = [(f"<{i}>", pictures.Point(x=0, y=10.0 * i, stderr=2.0, kind="recipe", hint="h")) for i in range(4)]
    svg = pictures.ranking(rows, name="score", dense=50.0)
    assert svg.count("<polygon") == 4
    assert "&lt;3&gt;" in svg
    assert "nan" not in svg
    places = [float(part.split(",")[0]) for part in svg.split('points="')[1:]]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("flapp", "--recipes: unknown recipe 'flapp'; did you mean 'flap'? known: "),
        ("flap,head_only", "did you mean 'heads_only'?"),
        ("", "--recipes: must name at least one recipe"),
        ("./nowhere.yaml", "--recipes: no file for './nowhere.yaml'"),
    ],
)
def test_bad_names_are_found_without_weights(study_path, tmp_path, capsys, monkeypatch, recipes, message):
    monkeypatch.setattr("adasearch.models.fetch_weights", None)
    assert compare(study_path, tmp_path / "run", recipes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_comparison_without_a_score_is_reported_and_fails(study_path, tmp_path, capsys):
    run = tmp_path / "run"
    assert compare(study_path, run, "heads_only") == 5
    assert "none of 1 recipes could be scored; heads_only: config: budget.remove" in capsys.readouterr().err
    assert [row["state"] for row in rows_of(run)] == ["done", "failed"]
    assert "must be at most" in read(run / "report.html")[1]


def test_what_all_rows_share_may_not_change(copied, tmp_path, tiny_checkpoint, capsys):
    for changes, name in (({"seed": 4}, "seed"), ({"budget": {"remove": 0.2}}, "budget")):
        assert compare(compare_file(tmp_path, tiny_checkpoint, **changes), copied) == 4
        assert f"holds another study: {name} differ" in capsys.readouterr().err


def test_searches_and_comparisons_have_folders_of_their_own(copied, study_path, tmp_path, capsys):
    assert main(["run", str(study_path), "--out", str(copied)]) == 4
    assert "holds what adasearch compare makes; give adasearch run another folder" in capsys.readouterr().err
    write_json(tmp_path / "search" / "manifest.json", {"seed": 3})
    assert compare(study_path, tmp_path / "search") == 4
    assert "holds what adasearch run makes; give adasearch compare another folder" in capsys.readouterr().err


def test_no_perplexity_of_text_that_models_are_tuned_on(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.delenv("ADASEARCH_DATA_ROOT", raising=False)

    def study(split: str, **objective):
        report = {**REPORT, "perplexity": ["owner/texts::test"]}
        trial = {"calibration": {"corpus": f"owner/texts::{split}"}}
        space = {"importance": {"choice": ["flap"]}}
        parts = {"search": ["cloze/pydoc"], "items": 12, **objective}
        path = compare_file(
            tmp_path, tiny_checkpoint, report=report, trial=trial, space=space, objective=parts, recipes={}
        )
        return load_study(path)

    with pytest.raises(ConfigError, match=r"'owner/texts::test' is read whole and trial.calibration.corpus reads it"):
        text_checks._check_perplexity(study("test"))
    text_checks._check_perplexity(study("train"))
    text_checks._check_perplexity(study("test", allow_shared_splits=True))
