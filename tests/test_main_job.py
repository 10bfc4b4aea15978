"""The main job from end to end: on a tiny random model with every step, and once on a real model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import adasearch
from adasearch.cli import main
from adasearch.config import load_study
from adasearch.environment import usable_cores
from adasearch.records import DENSE, read_finals, read_records
from adasearch.report import SPEEDS
from adasearch.run import _going_on
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = [
    "rank",
    "trial",
    "recipe",
    "search_score",
    "search_stderr",
    "report_score",
    "report_stderr",
    "retained",
    "parameters",
    "removed",
    "seconds",
    "state",
]


def study_file(folder: Path, checkpoint: str, /, **changes) -> Path:
    """Write a study that searches all four dimensions in few tokens; returns its path."""
    recovery = {"type": "lora", "tokens": 512, "length": 64, "batch": 2, "corpus": "pydoc"}
    data = {
        "name": "tiny",
        "model": {"name": checkpoint, "dtype": "float32"},
        "space": {
            "calibration.samples": {"int": [2, 4]},
            "calibration.draw": {"int": [0, 3]},
            "importance": {"choice": ["wanda_sp", "flap", "taylor", "obs"]},
            "compensation": {"choice": ["none", "bias", "least_squares"]},
            "allocation": {"choice": ["layer_profile", "global_score"]},
            "allocation.layer_profile": {"layer_profile": {"mlp": 1, "attention": 1}},
            "recovery.rank": {"int": [2, 8]},
        },
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 12, "select": 12},
        "report": {
            "tasks": ["cloze/pydoc"],
            "items": 12,
            "perplexity": ["pydoc"],
            "perplexity_tokens": 1024,
            "windows": [128],
        },
        "trial": {"calibration": {"corpus": "pydoc", "length": 64}, "recovery": recovery},
        "recipes": ["fasp"],
        "trials": 4,
        "seed": 3,
        "sampler": {"startup": 2},
        "cluster": {"workers": 1, "address": "in_process"},
        "finalize": {
            "top": 1,
            "recovery": {"type": "full", "tokens": 512, "length": 64, "batch": 2, "corpus": "pydoc"},
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**data, **changes}))
    return path


def scores_of(run: Path) -> dict[int, tuple[str, float]]:
    return {r.number: (json.dumps(r.config, sort_keys=True), r.result.score) for r in read_records(run) if r.result}


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, tmp_path_factory) -> Path:
    """Run folder of a whole study on the tiny model."""
    folder = tmp_path_factory.mktemp("job")
    run = folder / "run"
    assert main(["run", str(study_file(folder, str(tiny_checkpoint))), "--out", str(run)]) == 0
    return run


def test_the_job_leaves_what_the_readme_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "study.db",
        "trials",
        "cache",
        "leaderboard.csv",
        "report.html",
        "config.yaml",
        "manifest.json",
        "export",
    } <= names
    board = pd.read_csv(finished / "leaderboard.csv")
    assert list(board.columns) == [*COLUMNS, *SPEEDS]
    assert "dense" in set(board["trial"].astype(str))
    assert "<html" in (finished / "report.html").read_text()
    manifest = json.loads((finished / "manifest.json").read_text())
    splits = [set(manifest["items"][role]["cloze/pydoc"]) for role in ("search", "select", "report")]
    assert all(len(split) == 12 for split in splits)
    assert not splits[0] & splits[1]
    assert not splits[0] & splits[2]
    assert not splits[1] & splits[2]


def test_where_trials_ran_is_written_down(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    cluster = yaml.safe_load((finished / "config.yaml").read_text())["cluster"]
    cores = usable_cores()
    for placed in manifest["placement"].values():
        assert (placed["workers"], placed["threads"], placed["gpus"]) == (1, cores, 0.0)
        assert placed["summary"].startswith("1 worker x ")
    assert (cluster["workers"], cluster["threads"], cluster["gpus_per_worker"]) == (1, cores, 0.0)
    assert {r.environment["threads"] for r in read_records(finished)} == {str(cores)}


def test_validate_says_where_trials_would_run_and_what_does_not_fit(tmp_path, tiny_checkpoint, capsys):
    path = study_file(tmp_path, str(tiny_checkpoint), cluster={"workers": 3, "threads": 64}, trials=8)
    assert main(["validate", str(path)]) == 0
    out = capsys.readouterr().out
    assert "search: 3 workers x 64 threads, " in out
    assert f"warning: 3 workers x 64 threads are 192 threads on {usable_cores()} core" in out
    path = study_file(tmp_path, str(tiny_checkpoint), cluster={"workers": "auto"}, trials=4)
    assert main(["validate", str(path)]) == 0
    assert "search: 1 worker x " in capsys.readouterr().out, "four trials are too few for two workers"


@pytest.mark.parametrize(("knobs", "many"), [(13, True), (2, False)])
def test_validate_says_when_a_space_is_too_wide_for_its_trials(tmp_path, tiny_checkpoint, capsys, knobs, many):
    space = {
        "importance": {"choice": ["wanda_sp", "flap", "taylor", "obs", "magnitude", "act_norm", "random"]},
        "calibration.length": {"choice": list(range(33, 53))},  # many features, a single parameter
        "allocation": {"choice": ["layer_profile"]},
        "allocation.layer_profile": {"layer_profile": {"mlp": knobs, "attention": knobs}},
    }
    assert main(["validate", str(study_file(tmp_path, str(tiny_checkpoint), space=space))]) == 0
    out = capsys.readouterr().out
    assert f"4 dimensions, {3 + 2 * knobs} parameters" in out
    assert ("above 24 a search stays near its best trials" in out) == many


def test_a_run_goes_on_with_the_workers_it_began_with(finished, tmp_path, tiny_checkpoint):
    held = yaml.safe_load((finished / "config.yaml").read_text())
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({**held, "cluster": {"workers": 7, "threads": 1}}))
    open_number = load_study(study_file(tmp_path, str(tiny_checkpoint), cluster={"workers": "auto"}))
    assert _going_on(open_number, run).cluster.workers == 7
    assert _going_on(open_number, run).cluster.threads is None
    assert _going_on(open_number, tmp_path).cluster.workers == "auto"
    stated = load_study(study_file(tmp_path, str(tiny_checkpoint), cluster={"workers": 2}))
    assert _going_on(stated, run) == stated


def test_every_trial_meets_the_budget_up_to_a_unit(finished):
    manifest = json.loads((finished / "manifest.json").read_text())
    records = [r for r in read_records(finished) if r.number != DENSE]
    assert len(records) == 4
    channel = 3 * 24
    for record in records:
        assert record.result is not None
        assert manifest["target_parameters"] - channel < record.result.parameters <= manifest["target_parameters"]


def test_the_winner_loads_and_generates(finished):
    best = next((finished / "export").glob("1-trial*"))
    model = adasearch.load(best)
    plan = json.loads((best / "plan.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == plan["parameters"]
    ids = torch.tensor([tiny_tokenizer()("def f", add_special_tokens=False)["input_ids"]])
    cached = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))
    assert main(["verify", str(best)]) == 0
    assert "- Against the dense model: **" in (best / "README.md").read_text()


def test_the_same_command_again_repeats_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("trials/*/result.json")}
    assert main(["run", str(finished.parent / "tiny.yaml"), "--out", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("trials/*/result.json")} == before


def test_equal_studies_give_equal_trials_and_scores(finished, tmp_path, tiny_checkpoint):
    run = tmp_path / "again"
    assert main(["run", str(study_file(tmp_path, str(tiny_checkpoint))), "--out", str(run)]) == 0
    assert scores_of(run) == scores_of(finished)
    ours, theirs = read_finals(run), read_finals(finished)
    assert [(f.name, f.report, f.losses) for f in ours] == [(f.name, f.report, f.losses) for f in theirs]


def test_replay_gives_the_recorded_score(finished, capsys):
    number = max(r.number for r in read_records(finished) if r.result and not r.result.stopped)
    assert main(["replay", str(finished), "--trial", str(number)]) == 0
    assert capsys.readouterr().out.strip().endswith("equal")
    assert main(["replay", str(finished), "--trial", "99"]) == 2


def test_recipes_left_open_are_seeds_and_marked_and_stay_when_the_run_goes_on(tmp_path, tiny_checkpoint, capsys):
    space = {
        "importance": {"choice": ["wanda_sp", "flap"]},
        "compensation": {"choice": ["bias", "least_squares"]},
        "allocation": {"choice": ["layer_profile", "global_score"]},
        "allocation.global_score.normalise": {"choice": ["zscore", "none"]},
    }
    changes = {"recipes": "auto", "space": space}
    path, run = study_file(tmp_path, str(tiny_checkpoint), **changes), tmp_path / "run"
    assert main(["validate", str(path)]) == 0
    out = capsys.readouterr().out
    assert "trials: 4, of them recipes: flap, fasp\n" in out
    assert "not expressible: magnitude_l2 (" in out
    assert main(["run", str(path), "--out", str(run)]) == 0
    board = pd.read_csv(run / "leaderboard.csv", dtype=str, keep_default_na=False).set_index("trial")
    assert board["recipe"].to_dict() == {"dense": "", "0": "flap", "1": "fasp", "2": "", "3": ""}
    page = (run / "report.html").read_text()
    assert 'class="recipe"' in page
    assert "0 (flap)" in page
    held = load_study(run / "config.yaml")
    assert (list(held.recipes), held.all_recipes) == (["flap", "fasp"], False)
    study_file(tmp_path, str(tiny_checkpoint), **changes, trials=6)
    assert main(["run", str(path), "--out", str(run)]) == 0
    found = {r.number: r.recipe for r in read_records(run)}
    assert found == {DENSE: None, 0: "flap", 1: "fasp", **dict.fromkeys(range(2, 6))}


def test_status_and_report_read_a_run(finished, capsys):
    assert main(["status", str(finished)]) == 0
    assert "trials: 4 of 4 done" in capsys.readouterr().out
    assert main(["report", str(finished)]) == 0
    assert main(["status", str(finished.parent)]) == 2


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"budget": {"remove": 0.95}}, 2, "budget.remove: must be at most"),
        ({"report": {"tasks": ["piqqa"]}}, 2, "report.tasks: unknown task 'piqqa'"),
        ({"objective": {"search": ["piqa:train"]}, "report": {"tasks": ["piqa:train"]}}, 2, "report.tasks: "),
        ({"trial": {"calibration": {"corpus": "pydok"}, "recovery": "lora"}}, 2, "unknown corpus 'pydok'"),
        (
            {
                "trial": {
                    "calibration": {"corpus": "pydoc"},
                    "importance": {"type": "two_corpora", "corpus": "pydok"},
                    "recovery": "lora",
                }
            },
            2,
            "trial.importance.corpus: unknown corpus 'pydok'",
        ),
        ({"model": {"name": "./nowhere"}}, 3, "model.name: "),
        ({"objective": {"search": ["cloze/pydoc"], "items": 90_000}}, 3, "objective.search: "),
        ({"space": {"recovery.rnk": {"int": [2, 4]}}}, 2, "space.recovery.rnk"),
        ({"cluster": {"workers": 0}}, 2, "cluster.workers"),
    ],
)
def test_bad_input_is_found_without_weights(tmp_path, tiny_checkpoint, capsys, monkeypatch, changes, code, message):
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("adasearch.models.fetch_weights", refuse)
    path = study_file(tmp_path, str(tiny_checkpoint), **changes)
    for command in ("validate", "run"):
        assert main([command, str(path)]) == code
        error = capsys.readouterr().err
        assert message in error
        assert "tiny.yaml" in error or "corpus" in error


def test_a_truncated_model_is_refused(tmp_path, tiny_checkpoint, capsys):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["validate", str(study_file(tmp_path, str(copy)))]) == 3
    assert "model.safetensors" in capsys.readouterr().err


def test_an_unsupported_family_is_named_with_those_that_are(tmp_path, tiny_checkpoint, capsys):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert main(["validate", str(study_file(tmp_path, str(copy)))]) == 3
    error = capsys.readouterr().err
    assert "gpt2" in error
    assert "llama, mistral, qwen2, qwen3" in error


def test_uniform_widths_end_in_an_export_for_the_stock_class(tmp_path, tiny_checkpoint, capsys):
    space = {"importance": {"choice": ["wanda_sp", "magnitude"]}, "compensation": {"choice": ["none", "least_squares"]},
             "allocation": {"choice": ["layer_profile", "global_score", "uniform"]}}  # fmt: skip
    changes = {"budget": {"remove": 0.2, "uniform": True}, "space": space, "trials": 3}
    run = tmp_path / "run"
    assert main(["run", str(study_file(tmp_path, str(tiny_checkpoint), **changes)), "--out", str(run)]) == 0
    for record in read_records(run):
        assert record.result is not None
        assert len({width for name, width in record.result.widths.items() if name.endswith("mlp")}) == 1
        assert len({width for name, width in record.result.widths.items() if name.endswith("attn")}) == 1
    best = next((run / "export").glob("1-trial*"))
    opened = AutoModelForCausalLM.from_pretrained(best)
    assert type(opened).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in opened.parameters()) == json.loads((best / "plan.json").read_text())["parameters"]
    space["compensation"] = {"choice": ["none", "bias"]}
    assert main(["validate", str(study_file(tmp_path, str(tiny_checkpoint), **changes))]) == 2
    assert "tiny.yaml: space.compensation: bias adds biases" in capsys.readouterr().err


def test_a_run_folder_of_another_study_is_refused(finished, tmp_path, tiny_checkpoint, capsys):
    path = study_file(tmp_path, str(tiny_checkpoint), seed=4)
    assert main(["run", str(path), "--out", str(finished)]) == 4
    assert "holds another study: seed differ" in capsys.readouterr().err


def test_a_killed_job_goes_on_where_it_was(finished, tmp_path, tiny_checkpoint):
    """kill -9 in the middle; then the same command ends with the trials of a run that was never killed."""
    path = study_file(tmp_path, str(tiny_checkpoint))
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "adasearch.cli", "run", str(path), "--out", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 240
    while len(list(run.glob("trials/[0-9]*/result.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < limit, "the job did not get to its second trial"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in run.glob("trials/*/result.json")}
    assert main(["run", str(path), "--out", str(run)]) == 0
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert scores_of(run) == scores_of(finished)


def test_a_nan_trial_fails_with_its_reason_and_the_search_goes_on(tmp_path, tiny_checkpoint, monkeypatch):
    from adasearch import trial
    from adasearch.errors import TrialError

    real, calls = trial.recover, []

    def broken_once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise TrialError("nan", "the loss is nan at step 1", "recover")
        return real(*args)

    monkeypatch.setattr(trial, "recover", broken_once)
    run = tmp_path / "run"
    assert main(["run", str(study_file(tmp_path, str(tiny_checkpoint))), "--out", str(run)]) == 0
    failed = [r for r in read_records(run) if r.failure]
    assert [(r.number, r.failure.kind) for r in failed if r.failure] == [(1, "nan")]
    assert "the loss is nan" in (run / "report.html").read_text()


def test_the_command_line_starts_without_heavy_imports():
    code = (
        "import sys, adasearch, adasearch.cli; adasearch.cli.build_parser(); "
        "print([m for m in ('torch', 'ray', 'optuna') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
