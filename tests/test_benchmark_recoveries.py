"""The pure parts of `benchmarks/recoveries.py`: what a strategy's trial is, what is kept, and the table."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest
import yaml

from adasearch.config import TrialConfig
from adasearch.library import REPOSITORY, load_recipe
from benchmarks import recoveries
from benchmarks.recoveries import STRATEGIES, Amounts, amounts, laid, table

GIVEN = yaml.safe_load(STRATEGIES.read_text())
TEXT = {"length": 64, "batch": 2, "corpus": "pydoc"}


@pytest.mark.parametrize("name", GIVEN)
def test_every_strategy_is_a_trial_of_the_same_cut_and_text(name):
    recipe = load_recipe("slimllm", REPOSITORY / "studies" / "any.yaml", "")
    found = laid(recipe, TEXT, GIVEN[name], 640)
    assert found["importance"] == recipe["importance"]
    config = TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, **found}, name)
    options = config.recovery.options
    learns = [part.options for part in (config.hidden, config.schedule) if hasattr(part.options, "tokens")]
    assert len(learns) == name.startswith(("gates", "lora_prune", "movement", "pat"))
    for part in learns:
        assert (part.tokens, part.length, part.batch, part.corpus) == (640, 64, 2, "pydoc")
    if config.recovery.type != "none":
        assert (options.tokens, options.length, options.batch, options.corpus) == (640, 64, 2, "pydoc")


def test_amounts_stay_those_that_were_measured_and_others_may_join(tmp_path, monkeypatch):
    args, study = argparse.Namespace(out=tmp_path), SimpleNamespace(name="s")
    (tmp_path / "s-amounts.yaml").write_text("tokens: {none: null, lora: 640}\nchance: 0.25\n")
    assert amounts(args, study, {"lora": laid, "none": laid}) == Amounts(
        tokens={"lora": 640, "none": None}, chance=0.25
    )
    asked = []

    def measured(_args, _study, strategies):
        asked.extend(strategies)
        return Amounts(tokens=dict.fromkeys(strategies, 320), chance=0.25)

    monkeypatch.setattr(recoveries, "measured", measured)
    for _ in range(2):
        assert amounts(args, study, {"full": laid, "lora": laid}).tokens == {"full": 320, "lora": 640}
    assert asked == ["full"]
    assert amounts(args, study, {"none": laid}).tokens == {"none": None}


def row(name, score, perplexity=None):
    final = perplexity and SimpleNamespace(name=name, perplexity={"c@128": perplexity}, seconds={"recover": 9.0})
    return SimpleNamespace(name=name, score=(score, 0.0), final=final, reason="" if final else "nan: no figure")


def test_the_table_has_what_is_retained_of_all_and_of_what_is_above_chance(tmp_path):
    rows = (row("lora", 0.40, 20.0), row("full", 0.45, 15.0), row("odd", math.nan))
    found = SimpleNamespace(
        dense=row("dense", 0.50, 10.0), rows=rows, corpora=("c@128",), study=SimpleNamespace(seed=0)
    )
    _, _, dense, *lines = table(tmp_path, found, Amounts(tokens={"lora": 1280, "full": 640, "odd": 1}, chance=0.25))
    assert dense == "| dense | - | 9 | 50.0 | 100.0 % | 100 % | 10.0 | - |"
    assert lines == [
        "| full | 640 | 9 | 45.0 | 90.0 % | 80 % | 15.0 | - |",
        "| lora | 1,280 | 9 | 40.0 | 80.0 % | 60 % | 20.0 | - |",
        "| odd | nan: no figure |",
    ]
