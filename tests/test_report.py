"""The report and the leaderboard, from records that were made up for the purpose."""

from __future__ import annotations

import dataclasses
import html.parser
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch import pictures, report, report_html, report_rungs
from adasearch.config import Component, FinalizeConfig, SpaceConfig, StudyConfig, TaskScore, TrialResult
from adasearch.racing import Rung
from adasearch.records import (
    DENSE,
    Evidence,
    Failure,
    FinalRecord,
    Record,
    read_finals,
    trial_folder,
    write_final,
    write_items,
    write_record,
)
from adasearch.registry import NoOptions
from adasearch.search.outcomes import write_ended
from adasearch.search.stopping import Ended
from adasearch.sections import BudgetConfig, ModelConfig, ObjectiveConfig, ReportConfig, StoppingConfig

LAYERS = 12
DENSE_PARAMETERS = 134_515_008
TASKS = ("made_up/short", "made_up/long", "made_up/hard")


def study(**changes: Any) -> StudyConfig:
    parts: dict[str, Any] = {
        "name": "synthetic",
        "model": ModelConfig(name="synthetic/model"),
        "space": SpaceConfig(name="inline", dimensions={}),
        "budget": BudgetConfig(remove=0.2),
        "objective": ObjectiveConfig(search=TASKS, metric="margin"),
        "report": ReportConfig(tasks=TASKS, perplexity=("pydoc",)),
        "finalize": FinalizeConfig(recovery=Component(type="none", options=NoOptions())),
        "trial": {},
        "recipes": {},
        "trials": 24,
        "seed": 7,
    }
    return StudyConfig(**{**parts, **changes})


def task_score(task: str, acc: np.ndarray, margin: np.ndarray, *, norm: bool) -> TaskScore:
    n = len(acc)
    mean, stderr = float(acc.mean()), float(acc.std() / math.sqrt(n))
    figures = {"margin": float(margin.mean()), "margin_stderr": float(margin.std() / math.sqrt(n))}
    normed = {"acc_norm": mean if norm else None, "acc_norm_stderr": stderr if norm else None}
    return TaskScore(task=task, n=n, acc=mean, acc_stderr=stderr, **normed, **figures)


def make_items(skill: float, seed: int, items: int = 400) -> dict[str, np.ndarray]:
    """Return items as a run leaves them: the difficulty of an item is the same for every model."""
    found = {}
    for i, task in enumerate(TASKS):
        difficulty = np.random.default_rng(i).normal(size=items)
        luck = np.random.default_rng(seed + 10 * i).normal(scale=0.3, size=items)
        margin = np.tanh(skill - 0.3 * i + difficulty + luck)
        found[task] = margin
        found[f"{task}#acc"] = (margin > 0).astype(float)
    return found


def scores_of(items: dict[str, np.ndarray]) -> tuple[TaskScore, ...]:
    return tuple(task_score(t, items[f"{t}#acc"], items[t], norm=i != 0) for i, t in enumerate(TASKS))


def widths(rng: np.random.Generator | None) -> dict[str, int]:
    found = {}
    for layer in range(LAYERS):
        found[f"model.layers.{layer}.self_attn"] = 9 if rng is None else int(rng.integers(4, 10))
        found[f"model.layers.{layer}.mlp"] = 1536 if rng is None else int(1536 * rng.uniform(0.4, 1))
    return found


def rungs_of(score: float, *, stopped: bool, rival: float | None = None) -> tuple[Rung, ...]:
    """Return a divergence that falls as the score rises, and two looks at items, the first 0.01 below the score."""
    gaps = {"gap": None, "bound": None} if rival is None else {"gap": score - rival, "bound": score - rival + 0.02}
    found = [
        Rung(kind="divergence", share=0.0, value=1 - score, stderr=0.02, seconds=0.5),
        Rung(kind="recovered", share=0.3, value=score - 0.01, stderr=0.02, seconds=2.0, **gaps),
        Rung(kind="recovered", share=1.0, value=score, stderr=0.012, seconds=6.0, **gaps),
    ]
    return tuple(found[:2] if stopped else found)


def trial(run: Path, number: int, score: float, *, recipe: str | None = None, **facts: Any) -> None:
    rng = np.random.default_rng(number + 2)
    dense, stopped = number == DENSE, facts.get("stopped", False)
    result = TrialResult(
        score=score, stderr=0.012, tasks=(), parameters=DENSE_PARAMETERS if dense else int(DENSE_PARAMETERS * 0.8),
        widths=widths(None if dense else rng), items=600, stopped=stopped,
        seconds={"calibrate": 2.5, "recover": float(rng.uniform(10, 60)), "score": 8.25}, peak_bytes=1 << 30, notes={},
        rungs=() if dense else facts.get("rungs", rungs_of(score, stopped=stopped)),
    )  # fmt: skip
    parts = {"importance": {"type": "wanda_sp"}, "allocation": {"type": "uniform"}, "recovery": {"type": "lora"}}
    config = None if dense else {**parts, "calibration": {"corpus": "pydoc"}, "units": {"attention": "kv_group"}}
    write_record(
        run,
        Record(number=number, attempt=0, recipe=recipe, config=config, result=result, failure=None, environment={}),
    )


def failure(run: Path, number: int, message: str, attempt: int = 0) -> None:
    failed = Failure(kind="memory", message=message, phase="recover")
    write_record(
        run,
        Record(number=number, attempt=attempt, recipe=None, config={}, result=None, failure=failed, environment={}),
    )


def final(run: Path, name: str, number: int, role: str, *, skill: float, recipe: str | None = None) -> None:
    items = make_items(skill, seed=number + 50)
    write_items(run / "final" / name, items)
    dense = role == "dense"
    write_final(
        run,
        FinalRecord(
            name=name, trial=number, role=role, recipe=recipe, selected=scores_of(make_items(skill, seed=number + 90)),
            report=scores_of(items), perplexity={"pydoc@128": 20.0 - 4 * skill, "pydoc@2048": 15.0 - 4 * skill},
            parameters=DENSE_PARAMETERS if dense else int(DENSE_PARAMETERS * 0.8), removed=0.0 if dense else 0.2,
            seconds={"recover": 300.0, "report": 60.0}, export=None if dense else f"export/1-{name}", losses=(3.0, 2.0),
        ),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 24 trials: recipes 0 to 3, two stopped, two failed, three finalists and the best recipe."""
    folder = tmp_path / "synthetic"
    rng = np.random.default_rng(0)
    trial(folder, DENSE, 0.52)
    for number in range(24):
        recipe = ("wanda_sp", "flap", "taylor", "random")[number] if number < 4 else None
        if number in {9, 15}:
            failure(folder, number, "CUDA out of memory while in recover; <b>8 GiB</b> & more were asked for")
        else:
            trial(
                folder,
                number,
                0.30 + 0.006 * number + float(rng.normal(scale=0.02)),
                recipe=recipe,
                stopped=number in {6, 13},
            )
    final(folder, "dense", DENSE, "dense", skill=0.9)
    final(folder, "trial22", 22, "finalist", skill=0.7)
    final(folder, "trial23", 23, "finalist", skill=0.6)
    final(folder, "trial20", 20, "finalist", skill=0.5)
    final(folder, "trial1", 1, "recipe", skill=0.45, recipe="flap")
    return folder


class Balance(html.parser.HTMLParser):
    """Collects tags left open or closed twice."""

    VOID = frozenset({"meta", "br", "line", "rect", "circle", "polygon", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> tuple[str, str]:
    """Return a report's source and its visible text, once its tags are seen to balance."""
    source = path.read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(source)
    assert not parser.wrong
    assert not parser.open
    return source, " ".join(" ".join(parser.text).split())


class TestLeaderboard:
    def test_columns_are_the_promised_ones(self, run: Path) -> None:
        table = report.leaderboard(run, study())
        names = "rank, trial, recipe, search_score, search_stderr, report_score, report_stderr, retained, parameters, "
        assert ", ".join(table.columns) == names + "removed, seconds, state"
        again = pd.read_csv(run / "leaderboard.csv")
        assert list(again.columns) == list(table.columns)
        assert len(again) == 25

    def test_order(self, run: Path) -> None:
        table = report.leaderboard(run, study())
        assert table.trial[:4].tolist() == ["dense", "22", "23", "20"]
        assert pd.isna(table["rank"][0])
        assert table["rank"][1:4].tolist() == [1, 2, 3]
        assert table.state.tolist()[-4:] == ["stopped", "stopped", "failed", "failed"]
        complete = table[(table.state == "complete") & table.report_score.isna()].search_score
        assert complete.is_monotonic_decreasing

    def test_report_columns_are_for_finalists(self, run: Path) -> None:
        table = report.leaderboard(run, study()).set_index("trial")
        assert set(table.index[table.report_score.notna()]) == {"dense", "22", "23", "20", "1"}
        assert table.retained["dense"] == 1.0
        assert table.retained["22"] == pytest.approx(table.report_score["22"] / table.report_score["dense"])
        assert table.removed["22"] == pytest.approx(0.2)
        assert table.removed["dense"] == 0.0

    def test_a_later_success_beats_an_earlier_failure(self, tmp_path: Path) -> None:
        failure(tmp_path, 0, "first")
        record = Record(
            number=0, attempt=1, recipe=None, config={}, failure=None, environment={},
            result=TrialResult(score=0.1, stderr=0.0, tasks=(), parameters=8, widths={}, items=1, stopped=False,
                               seconds={}, peak_bytes=0, notes={}),
        )  # fmt: skip
        write_record(tmp_path, record)
        assert report.leaderboard(tmp_path, study()).state.tolist() == ["complete"]

    def test_empty_run(self, tmp_path: Path) -> None:
        assert len(report.leaderboard(tmp_path, study())) == 0
        read(report.write(tmp_path, study()))

    def test_mean_prefers_acc_norm(self) -> None:
        scores = scores_of(make_items(0.5, 1))
        mean, stderr = report.mean_score(scores)
        assert mean == pytest.approx(np.mean([scores[0].acc, scores[1].acc_norm, scores[2].acc_norm]))
        assert stderr == pytest.approx(math.sqrt(sum(s.acc_stderr**2 for s in scores)) / 3)


class TestPairedDifference:
    @pytest.fixture(autouse=True, scope="class")
    def _fewer(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(report, "RESAMPLES", 2000)
            yield

    def test_covers_the_truth(self) -> None:
        """About 95 of 100 intervals hold the true difference, 0.1."""
        hits = 0
        for seed in range(100):
            rng = np.random.default_rng(seed)
            a = {"t": rng.normal(0.1, 1, 80), "u": rng.normal(0.1, 1, 80)}
            _, low, high = report.paired_difference(a, {"t": np.zeros(80), "u": np.zeros(80)}, seed) or (0, 0, 0)
            hits += low <= 0.1 <= high
        assert 88 <= hits <= 100

    def test_matches_the_closed_form(self) -> None:
        rng = np.random.default_rng(3)
        gap = (rng.random(1000) < 0.6).astype(float)
        mean, low, high = report.paired_difference({"t": gap}, {"t": np.zeros(1000)}, 0) or (0, 0, 0)
        half = 1.96 * gap.std() / math.sqrt(1000)
        assert mean == pytest.approx(gap.mean())
        assert (low, high) == (pytest.approx(mean - half, abs=0.004), pytest.approx(mean + half, abs=0.004))

    def test_tasks_weigh_the_same(self) -> None:
        a = {"big": np.ones(1000), "small": np.zeros(10)}
        b = {"big": np.zeros(1000), "small": np.zeros(10)}
        assert (report.paired_difference(a, b, 0) or (0,))[0] == pytest.approx(0.5)

    def test_equal_models_show_no_difference(self) -> None:
        a = make_items(0.5, 3)
        assert report.paired_difference(a, a, 0) == (0.0, 0.0, 0.0)

    def test_nothing_in_common(self) -> None:
        assert report.paired_difference({"a": np.ones(3)}, {"b": np.ones(3)}, 0) is None
        assert report.paired_difference({"a": np.ones(3)}, {"a": np.ones(4)}, 0) is None

    @given(st.integers(0, 99), st.integers(1, 60))
    def test_antisymmetric_and_repeatable(self, seed: int, items: int) -> None:
        a, b = make_items(0.2, seed, items), make_items(0.4, seed + 1, items)
        one, two = report.paired_difference(a, b, seed), report.paired_difference(b, a, seed)
        assert one == report.paired_difference(a, b, seed)
        assert one is not None
        assert two is not None
        assert one[0] == pytest.approx(-two[0])
        assert one[1] <= one[0] <= one[2]


class TestPage:
    def test_is_one_file_that_asks_for_nothing(self, run: Path) -> None:
        source, _ = read(report.write(run, study()))
        assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|url\(|@import|<script|https?:", source)
        assert len(source) < 400_000

    def test_says_what_was_found(self, run: Path) -> None:
        _, text = read(report.report(run, study()))
        for words in ("dense score retained", "20.0 %", "Against the dense model", "Against the best published recipe"):
            assert words in text
        assert "flap (trial 1)" in text
        assert "Search scores are optimistic" in text
        assert "acc_norm where a task has it" in text
        assert "adasearch.load" in text
        assert "Perplexity" in text
        assert str(run.parent) not in text

    def test_everything_is_escaped(self, run: Path) -> None:
        evil = "<script>alert('x')</script>\"&"
        trial(run, 30, 0.9, recipe=evil)
        failure(run, 31, evil)
        final(run, "trial30", 30, "finalist", skill=2.0, recipe=evil)
        source, text = read(report.write(run, study(model=ModelConfig(name=evil))))
        assert "<script" not in source
        assert "<script>alert" in text

    def test_how_finalists_were_trained_is_told(self, run: Path) -> None:
        _, text = read(report.write(run, study()))
        assert "loss 3.000 at first, 2.000 over the last quarter" in text

    def test_no_claim_without_a_difference(self, run: Path) -> None:
        final(run, "trial1", 1, "recipe", skill=0.7, recipe="flap")
        _, text = read(report.write(run, study()))
        assert "no difference shown" in text

    def test_verdicts(self) -> None:
        made = report.Difference
        assert "no difference shown" in report_html.verdict(made(mean=0.01, low=-0.01, high=0.03), "x")
        assert "no difference shown" in report_html.verdict(made(mean=0.01, low=0.0, high=0.03), "x")
        assert ">better by 2.0 points<" in report_html.verdict(made(mean=0.02, low=0.01, high=0.03), "x")
        assert ">worse by 2.0 points<" in report_html.verdict(made(mean=-0.02, low=-0.03, high=-0.01), "x")
        assert report_html.verdict(None, "x") == ""

    def test_the_winners_scores_stand_side_by_side(self, run: Path) -> None:
        _, text = read(report.write(run, study()))
        assert "winner's curse" not in text
        for number, merit in ((22, 0.41), (23, 0.43), (20, 0.40)):
            record = next(r for r in read_finals(run) if r.trial == number)
            known = Evidence(score=0.46, stderr=0.012, mean=0.44 if number == 23 else 0.43, sd=0.008)
            write_final(run, dataclasses.replace(record, search=known, merit=merit))
        found = report.gather(run, study())
        assert [f.trial for f in found.finals] == [23, 22, 20]
        _, text = read(report.write(run, study()))
        margin = np.mean([s.margin for s in found.finals[0].report])
        assert "The winner scored 0.460 in the search; all trials together say 0.440, 0.020 below" in text
        assert "0.460 ± 0.012 0.440 ± 0.008" in text
        assert f"0.430 {margin:.3f}" in text  # merit, then the margin on report items

    def test_finalists_stand_by_the_metric_of_the_study(self, run: Path) -> None:
        _, text = read(report.write(run, study()))
        assert "select margin merit report margin" in text
        assert "the margin on the select items" in text
        table = text.split("Scores on report items")[1].split("Perplexity")[0]
        assert "log_score" not in table  # these records are older than it is
        for record in read_finals(run):
            parts = {
                role: tuple(
                    dataclasses.replace(s, log_score=shift - s.margin, log_score_stderr=0.01)
                    for s in getattr(record, role)
                )
                for role, shift in (("selected", 0.0), ("report", -1.0))
            }
            write_final(run, dataclasses.replace(record, **parts))
        chosen = study(objective=ObjectiveConfig(search=TASKS, metric="log_score"))
        found = report.gather(run, chosen)
        assert [f.trial for f in report.gather(run, study()).finals] == [22, 23, 20]
        assert [f.trial for f in found.finals] == [20, 23, 22]
        _, text = read(report.write(run, chosen))
        assert "select log_score merit report log_score" in text
        assert "the log_score on the select items" in text
        select, fresh = (np.mean([s.log_score for s in x]) for x in (found.finals[0].selected, found.finals[0].report))
        assert f"{select:.3f} – {fresh:.3f}" in text
        table = text.split("Scores on report items")[1].split("Perplexity")[0]
        assert table.count("log_score") == len(TASKS)

    def test_how_the_search_ended(self, run: Path) -> None:
        _, text = read(report.write(run, study()))
        assert "The search ran all 24 trials." in text
        rule = StoppingConfig(gain=0.2)
        write_ended(run, Ended(reason="expected gain 0.002 is below 0.2", asked=24, trials=60, rule=rule))
        _, text = read(report.write(run, study(trials=60, stopping=rule)))
        assert "The search ended after 24 of 60 trials: expected gain 0.002 is below 0.2." in text
        assert "· 24 trials ·" in text
        _, text = read(report.write(run, study(trials=60)))
        assert "The search" not in text.replace("The search maximised", "")

    def test_best_that_is_a_recipe(self, run: Path) -> None:
        final(run, "trial2", 2, "finalist", skill=3.0, recipe="taylor")
        _, text = read(report.write(run, study()))
        assert "The best model is a published recipe" in text

    def test_run_under_way(self, tmp_path: Path) -> None:
        trial(tmp_path, DENSE, 0.5)
        trial(tmp_path, 0, 0.4)
        _, text = read(report.write(tmp_path, study()))
        assert "No finalist has been scored" in text
        assert "Needs at least 10 scored trials" in text

    def test_damaged_record_is_left_out(self, run: Path) -> None:
        (trial_folder(run, 22, 0) / "result.json").write_text("{")
        read(report.write(run, study()))

    def test_failures_are_listed(self, run: Path) -> None:
        _, text = read(report.write(run, study()))
        assert "2 of 24 trials gave no score" in text
        assert "CUDA out of memory while in recover; <b>8 GiB</b>" in text


class TestRungs:
    def results(self, run: Path) -> list[TrialResult]:
        return [r.result for r in report.gather(run, study()).records if r.result is not None]

    def test_each_is_held_against_the_final_score(self, run: Path) -> None:
        results = self.results(run)
        early, late = report_rungs.rung_rows(results)
        assert (early.label, late.label) == ("divergence", "recovered, 30 % of items")
        assert (early.trials, late.trials) == (22, 20)  # of the two that stopped only the divergence counts
        assert early.correlation == pytest.approx(1.0)
        assert (early.seconds, late.seconds) == (0.5, 2.0)
        assert early.share == pytest.approx(0.5 / np.mean([sum(r.seconds.values()) for r in results]))

    def test_few_or_equal_trials_have_no_correlation(self, run: Path) -> None:
        results = self.results(run)
        assert report_rungs.rung_rows(results[:7])[0].correlation is None
        assert report_rungs.rung_rows(results[:8])[0].correlation is not None
        assert report_rungs.rung_rows(results[:1] * 9)[0].correlation is None
        assert report_rungs.rung_rows([]) == []

    @pytest.mark.filterwarnings("ignore:An input array is constant")
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
    def test_the_correlation_is_that_of_pandas(self, pairs: list[tuple[int, int]]) -> None:
        a, b = np.array(pairs, dtype=float).T
        expected = pd.Series(a).corr(pd.Series(b), method="spearman")
        assert float(report_rungs.spearman(a, b)) == pytest.approx(expected, nan_ok=True)
        lines = report_rungs.spearman(np.stack([a, b]), np.stack([b, b]))
        assert lines.tolist() == pytest.approx([expected, 1.0 if len(set(b)) > 1 else math.nan], nan_ok=True)

    def test_the_control_group_shows_what_stopping_costs(self, tmp_path: Path) -> None:
        trial(tmp_path, 0, 0.5, rungs=rungs_of(0.5, stopped=False, rival=0.4))  # never behind
        trial(tmp_path, 1, 0.3, rungs=rungs_of(0.3, stopped=False, rival=0.4))  # behind to the end
        recovering = rungs_of(0.3, stopped=False, rival=0.4)[:2] + rungs_of(0.5, stopped=False, rival=0.4)[2:]
        trial(tmp_path, 2, 0.5, rungs=recovering)
        trial(tmp_path, 3, 0.3, rungs=rungs_of(0.3, stopped=True, rival=0.4), stopped=True)
        assert report_rungs.control_group(self.results(tmp_path)) == (2, 1)
        _, text = read(report.write(tmp_path, study()))
        assert "2 trials that were behind went on as a control; 1 of them ended ahead" in text

    def test_who_stopped_before_its_score_judges_no_rung_and_saves_time(self, tmp_path: Path) -> None:
        for number in range(9):
            trial(tmp_path, number, 0.3 + 0.01 * number)
        early = rungs_of(0.5, stopped=True)[:1]
        for number in (9, 10):
            trial(tmp_path, number, 0.1, rungs=early, stopped=True)
        trial(tmp_path, 11, 0.1, rungs=rungs_of(0.1, stopped=True), stopped=True)
        results = self.results(tmp_path)
        assert [result.measured for result in results[8:]] == [True, False, False, True]
        first, second = report_rungs.rung_rows(results)
        assert (first.trials, first.stopped, second.trials, second.stopped) == (10, 2, 9, 1)
        assert first.correlation == pytest.approx(1.0)  # 1 - 0.5 beside 0.1 would spoil the order
        full = np.mean([sum(r.seconds.values()) for r in results[:9]])
        took = [sum(r.seconds.values()) for r in results[9:]]
        assert first.saved == pytest.approx(max(0.0, 2 * full - sum(took[:2])))
        assert second.saved == pytest.approx(max(0.0, full - took[2]))

    def test_without_a_race_the_control_group_is_held_against_the_best_before(self, tmp_path: Path) -> None:
        asked = [dataclasses.replace(rungs_of(0.4, stopped=False)[0], least=-0.5), *rungs_of(0.4, stopped=False)[1:]]
        trial(tmp_path, 0, 0.4, rungs=rungs_of(0.4, stopped=False))
        trial(tmp_path, 1, 0.3, rungs=tuple(asked))  # rightly to be stopped
        trial(tmp_path, 2, 0.5, rungs=tuple(asked))  # wrongly
        trial(tmp_path, 3, 0.6, rungs=rungs_of(0.6, stopped=False))
        assert report_rungs.control_group(self.results(tmp_path)) == (2, 1)

    def test_the_page_shows_them(self, run: Path) -> None:
        source, text = read(report.write(run, study()))
        assert "What is known early" in text
        assert "divergence 22 0.5 s" in text
        assert "+1.00" in text
        assert "divergence from the dense model, nats per token" in source

    def test_a_run_without_rungs_has_no_such_section(self, tmp_path: Path) -> None:
        trial(tmp_path, 0, 0.5, rungs=())
        _, text = read(report.write(tmp_path, study()))
        assert "What is known early" not in text


class TestWidths:
    def test_relative_to_dense(self, run: Path) -> None:
        rows = report.kept_widths(report.gather(run, study()), 5)
        assert [r.trial for r in rows[:3]] == [22, 23, 20]
        assert set(rows[0].kept) == {"attention", "mlp"}
        values = [v for row in rows for kept in row.kept.values() for v in kept]
        assert len(rows[0].kept["mlp"]) == LAYERS
        assert 0 < min(values) < max(values) <= 1


class TestPictures:
    @given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
    def test_ticks(self, low: float, span: float) -> None:
        found = pictures.ticks(low, low + span)
        assert 1 <= len(found) <= 6
        assert found == sorted(found)
        assert all(low - span * 1e-3 <= t <= low + span * 1.001 for t in found)

    def test_single_point(self) -> None:
        point = pictures.Point(x=0, y=0.5, stderr=0.0, kind="proposal", hint="<a>")
        svg = pictures.scatter([point], names=("x", "y"), dense=0.5, staircase=True)
        assert "nan" not in svg
        assert "&lt;a&gt;" in svg


def test_the_report_says_how_far_earlier_runs_were_believed() -> None:
    made = study()
    found = report.Findings(
        study=made, records=(), dense_record=None, dense=None, finals=(), best=None, recipe=None, versus_dense=None,
        versus_recipe=None, importance={}, importance_note="", earlier=("runs/<a>: weight 0.60, all of use",),
    )  # fmt: skip
    assert "runs/&lt;a&gt;: weight 0.60" in report_html.page(found, Path("run"))
