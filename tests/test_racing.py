"""The arithmetic of a race against its definition and against simulation; then races of real trials of a tiny model."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from adasearch import racing
from adasearch.config import TrialConfig, load_study
from adasearch.data import documents
from adasearch.errors import DataError
from adasearch.promotion import Fit, Gate
from adasearch.racing import FidelityConfig, Race, RacingConfig, Rung
from adasearch.records import read_items, read_record
from adasearch.search.driver import Assignment
from adasearch.search.gates import told_of
from adasearch.search.notes import trial_note
from adasearch.search.outcomes import Asked, copied_record
from adasearch.trial import run_trial
from adasearch.workbench import Workbench
from adasearch.worker import run_assignment
from tests.test_main_job import study_file


def values(rng, items=40, tasks=2, shift=0.0):
    return {f"t{i}": np.tanh(rng.normal(0.3 + shift, 0.6, items)) for i in range(tasks)}


def first(found, n):
    return {task: x[:n] for task, x in found.items()}


class TestArithmetic:
    def test_a_single_task_is_the_paired_t_test(self):
        rng = np.random.default_rng(0)
        mine, rival = values(rng, tasks=1), values(rng, tasks=1)
        gap, error, freedom = racing.paired_gap(mine, rival)
        known = stats.ttest_rel(mine["t0"], rival["t0"])
        assert (gap / error, freedom) == (pytest.approx(known.statistic), pytest.approx(known.df))
        level = 1 - NormalDist().cdf(-2.0) / 3
        high = known.confidence_interval(confidence_level=2 * level - 1).high
        assert racing.upper_bound(mine, rival, 2.0, 3) == (pytest.approx(gap), pytest.approx(high))

    def test_tasks_weigh_the_same_and_the_freedom_is_that_of_welch(self):
        rng = np.random.default_rng(1)
        mine = {"a": rng.normal(1, 2, 50), "b": rng.normal(0, 1, 20)}
        zero = {"a": np.zeros(50), "b": np.zeros(30)}
        gap, error, freedom = racing.paired_gap(mine, zero)
        assert gap == pytest.approx((mine["a"].mean() + mine["b"].mean()) / 2)
        known = stats.ttest_ind(mine["a"], -mine["b"], equal_var=False)  # the same sum of two means
        assert (2 * gap / (2 * error), freedom) == (pytest.approx(known.statistic), pytest.approx(known.df))

    def test_more_looks_ask_for_more(self):
        rng = np.random.default_rng(2)
        mine, rival = values(rng), values(rng, shift=0.2)
        bounds = [racing.upper_bound(mine, rival, 2.0, looks)[1] for looks in (1, 2, 4)]
        assert bounds == sorted(bounds)
        assert bounds[0] < bounds[2]

    @pytest.mark.parametrize("items", [6, 60])
    def test_equal_models_are_rarely_called_behind(self, items):
        """The chance that any of two looks stops a model that is no worse is at most that of one look at z."""
        rng, stopped = np.random.default_rng(3), 0
        for _ in range(4000):
            mine, rival = values(rng, items), values(rng, items)
            looks = [racing.upper_bound(first(mine, n), rival, 1.645, 2)[1] for n in (items // 2, items)]
            stopped += min(looks) < 0
        assert 0.02 < stopped / 4000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)

    def test_equal_items_are_no_gap(self):
        mine = values(np.random.default_rng(4))
        assert racing.upper_bound(mine, mine, 2.0, 2) == (0.0, 0.0)
        assert racing.upper_bound(first(mine, 1), mine, 2.0, 2) == (0.0, 0.0)

    def test_an_estimate_from_all_items_is_the_score(self):
        rng = np.random.default_rng(5)
        mine, rival = values(rng), values(rng)
        score, stderr = racing.estimate(mine, rival)
        assert score == pytest.approx(np.mean([x.mean() for x in mine.values()]))
        assert stderr == pytest.approx(math.hypot(*(x.std(ddof=1) / math.sqrt(40) for x in mine.values())) / 2)

    def test_an_estimate_from_some_items_is_unbiased_with_the_variance_that_it_states(self):
        rng = np.random.default_rng(6)
        scores, errors = [], []
        for _ in range(4000):
            common = rng.normal(0.2, 0.5, 60)
            mine, rival = ({"t": common + rng.normal(shift, 0.3, 60)} for shift in (-0.1, 0.0))
            score, stderr = racing.estimate(first(mine, 15), rival)
            scores.append(score)
            errors.append(stderr**2)
        assert np.mean(scores) == pytest.approx(0.1, abs=3 * np.std(scores) / math.sqrt(4000))
        assert np.mean(errors) == pytest.approx(np.var(scores), rel=0.07)

    def test_the_control_group_is_a_share_drawn_by_number(self):
        drawn = [n for n in range(4000) if racing.in_control(0.1, 7, n)]
        assert 340 < len(drawn) < 460
        assert drawn == [n for n in range(4000) if racing.in_control(0.1, 7, n)]
        assert drawn != [n for n in range(4000) if racing.in_control(0.1, 8, n)]
        assert not any(racing.in_control(0.0, 7, n) for n in range(100))
        assert all(racing.in_control(1.0, 7, n) for n in range(100))

    def test_rungs_have_an_order_and_higher_is_better(self):
        made = {"stderr": 0.0, "seconds": 0.0}
        found = [
            Rung(kind="divergence", share=0.0, value=0.4, **made),
            Rung(kind="unrecovered", share=1.0, value=0.2, **made),
            Rung(kind="midway", share=0.0, value=0.3, least=-0.2, **made),
            Rung(kind="recovered", share=0.01, value=0.3, **made),
            Rung(kind="recovered", share=0.3, value=0.3, gap=-0.2, bound=-0.1, **made),
        ]
        assert [rung.step for rung in found] == [0, 1, 2, 3, 30]
        assert [rung.merit for rung in found] == [-0.4, 0.2, -0.3, 0.3, 0.3]
        assert [rung.behind for rung in found] == [False, False, True, False, True]
        assert found[4].label == "recovered, 30 % of items"


def trial(importance="wanda_sp", tokens=256):
    return {
        "calibration": {"corpus": "pydoc", "length": 64, "samples": 2},
        "importance": {"type": importance},
        "recovery": {"type": "lora", "tokens": tokens, "length": 64, "batch": 2, "corpus": "pydoc"},
    }


@pytest.fixture(scope="module")
def make_bench(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("racing")
    objective = {"search": ["cloze/pydoc", "cloze/stdlib"], "items": 20, "select": 4}
    study = load_study(study_file(folder, str(tiny_checkpoint), objective=objective, racing={"rungs": [0.6, 0.3]}))

    def make(**changes):
        return Workbench(dataclasses.replace(study, **changes), folder / "run", 1)

    return make


@pytest.fixture(scope="module")
def bench(make_bench):
    return make_bench()


@pytest.fixture(scope="module")
def alone(bench):
    """Result and item values of a trial that did not race."""
    return run_trial(trial(), bench)


def test_a_trial_records_what_was_known_on_its_way(alone):
    result, found = alone
    assert [(r.kind, r.share) for r in result.rungs] == [
        ("divergence", 0.0), ("midway", 0.0), ("recovered", 0.3), ("recovered", 0.6), ("recovered", 1.0),
    ]  # fmt: skip
    assert result.rungs[0].value > 0
    assert result.rungs[1].value not in {0.0, result.rungs[0].value}  # one step of two has been made
    spent = [rung.spent for rung in result.rungs]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(sum(result.seconds.values()), abs=0.5)
    assert set(result.seconds) >= {"recover", "midway"}
    assert (result.rungs[-1].value, result.rungs[-1].stderr) == (result.score, result.stderr)
    for rung, n in zip(result.rungs[2:], (6, 12, 20), strict=True):
        assert rung.value == pytest.approx(np.mean([x[:n].mean() for x in found.values()]))
    assert all(rung.gap is None for rung in result.rungs)
    assert result.seconds["divergence"] >= result.rungs[0].seconds - 1e-3 > 0


def test_what_is_measured_before_the_recovery_changes_no_score(alone, make_bench):
    none = make_bench(fidelity=FidelityConfig(divergence=0))
    more = make_bench(fidelity=FidelityConfig(divergence=2048, unrecovered=0.5, midway=0.5))
    bare, _ = run_trial(trial(), none)
    rich, _ = run_trial(trial(), more)
    assert bare.tasks == rich.tasks == alone[0].tasks
    assert [rung.kind for rung in bare.rungs] == ["recovered"] * 3
    assert [rung.kind for rung in rich.rungs] == ["divergence", "unrecovered", "midway", *["recovered"] * 3]
    assert rich.rungs[1].share == 0.5
    assert rich.rungs[1].value != rich.rungs[3].value


def test_the_divergence_is_that_of_the_cut_whatever_the_recovery(alone, bench):
    other, _ = run_trial(trial(tokens=128), bench)
    assert other.rungs[0].value == alone[0].rungs[0].value
    assert other.rungs[1].kind == "recovered"  # a recovery of one step has no middle
    assert other.score != alone[0].score
    cut_otherwise, _ = run_trial(trial("magnitude"), bench)
    assert cut_otherwise.rungs[0].value != alone[0].rungs[0].value
    dense, _ = run_trial(None, bench)
    assert [rung.kind for rung in dense.rungs] == ["recovered"] * 3


def test_the_text_is_of_every_corpus_and_of_no_calibration(make_bench, bench):
    assert bench.reference() is bench.reference()
    space = {"calibration.corpus": {"choice": ["pydoc", "stdlib"]}, "recovery.rank": {"int": [2, 8]}}
    both = make_bench(space=dataclasses.replace(bench.study.space, dimensions=space))
    texts = [bench.base.tokenizer.decode(line) for line in both.reference().tokens]
    assert len(texts) == len(bench.reference().tokens) == 16
    elsewhere = 0
    for text, corpus in zip(texts, ["pydoc"] * 8 + ["stdlib"] * 8, strict=True):
        assert any(text in f"{document}\n\n" for document in documents(corpus, "search"))
        elsewhere += any(text in document for part in ("fit", "report") for document in documents(corpus, part))
    assert elsewhere <= 2  # 64 letters of a phrase that docstrings repeat


def test_a_corpus_without_text_for_it_is_named(make_bench, tmp_path):
    small = tmp_path / "small.txt"
    small.write_text("too little\n")
    bench = make_bench(trial={"calibration": {"corpus": str(small)}})
    with pytest.raises(DataError, match=r"fidelity.divergence: corpus .*small.txt.*; 0 leaves the comparison out"):
        bench.reference()


def test_a_trial_behind_stops_with_an_estimate_and_a_control_does_not(alone, bench):
    result, found = alone
    rival = {task: x + 0.5 + 0.01 * np.arange(len(x)) for task, x in found.items()}
    stopped, items = run_trial(trial(), bench, race=Race(rival=rival))
    assert stopped.stopped
    assert {len(x) for x in items.values()} == {6}
    assert (stopped.score, stopped.stderr) == racing.estimate(items, rival)
    assert stopped.rungs[-1].behind
    assert stopped.rungs[-1].value == result.rungs[2].value
    assert stopped.measured
    control, whole = run_trial(trial(), bench, race=Race(rival=rival, stops=False))
    assert not control.stopped
    assert [rung.behind for rung in control.rungs] == [False, False, True, True, True]
    assert control.score == result.score
    assert all(np.array_equal(whole[task], found[task]) for task in found)


def test_a_trial_ahead_or_with_a_rival_of_other_items_goes_on(alone, bench):
    result, found = alone
    ahead, _ = run_trial(trial(), bench, race=Race(rival={task: x - 0.1 for task, x in found.items()}))
    assert (ahead.stopped, ahead.score) == (False, result.score)
    assert ahead.rungs[2].gap == pytest.approx(0.1)
    short = {task: x[:5] + 1.0 for task, x in found.items()}
    for rival in (short, {"other": np.ones(20)}):
        unraced, _ = run_trial(trial(), bench, race=Race(rival=rival))
        assert (unraced.stopped, unraced.score) == (False, result.score)
        assert all(rung.gap is None for rung in unraced.rungs)


def test_without_racing_there_is_one_block(make_bench):
    result, _ = run_trial(trial(), make_bench(racing=RacingConfig(enabled=False)))
    assert [rung.share for rung in result.rungs] == [0.0, 0.0, 1.0]


def gate(kind, least, center=-1.0, **changes):
    fit = Fit(center=center, lowest=-9.0, intercept=0.3, slope=0.05, slope_stderr=0.01, scale=0.02, freedom=9)
    return Gate(kind=kind, least=least, fit=fit, **changes)


@pytest.mark.parametrize(("kind", "phases"), [("divergence", set()), ("midway", {"recover", "midway"})])
def test_a_trial_that_fails_a_gate_stops_there_with_the_score_to_be_expected(alone, bench, kind, phases):
    known = next(rung for rung in alone[0].rungs if rung.kind == kind)
    asked = gate(kind, known.merit + 1e-6)
    result, items = run_trial(trial(), bench, gates=[asked])
    assert (result.stopped, result.measured, result.tasks, result.items, items) == (True, False, (), 0, {})
    assert result.rungs[-1].kind == kind
    assert result.rungs[-1].value == known.value
    assert result.rungs[-1].least == asked.least
    assert result.rungs[-1].behind
    x = -math.log(known.value)
    assert result.score == pytest.approx(0.3 + 0.05 * (x + 1))
    assert result.stderr == pytest.approx(math.hypot(0.02, 0.01 * (x + 1)))
    assert set(result.seconds) & {"recover", "midway", "evaluate"} == phases
    assert (result.parameters, result.widths) == (alone[0].parameters, alone[0].widths)
    after, _ = run_trial(trial(), bench)  # the worker is as it was
    assert after.score == alone[0].score


def test_a_trial_that_passes_its_gates_or_is_of_the_control_group_goes_on(alone, bench):
    first, second = alone[0].rungs[:2]
    passed, _ = run_trial(trial(), bench, gates=[gate("divergence", first.merit), gate("midway", second.merit)])
    assert (passed.stopped, passed.score) == (False, alone[0].score)
    assert [rung.least for rung in passed.rungs] == [first.merit, second.merit, None, None, None]
    assert not any(rung.behind for rung in passed.rungs)
    spared, _ = run_trial(trial(), bench, gates=[gate("divergence", 0.0, stops=False)])
    assert (spared.stopped, spared.score) == (False, alone[0].score)
    assert [rung.behind for rung in spared.rungs] == [True, False, False, False, False]
    unasked, _ = run_trial(trial(tokens=128), bench, gates=[gate("midway", 0.0)])  # of one step: never looked at
    assert not unasked.stopped


def test_the_gate_of_the_unrecovered_score_comes_before_the_recovery(make_bench):
    bench = make_bench(fidelity=FidelityConfig(unrecovered=0.5))
    result, _ = run_trial(trial(), bench, gates=[gate("unrecovered", 2.0, center=0.0)])
    assert [rung.kind for rung in result.rungs] == ["divergence", "unrecovered"]
    assert result.score == pytest.approx(0.3 + 0.05 * result.rungs[-1].value)
    assert "recover" not in result.seconds


def test_a_full_recovery_is_looked_at_midway_too(alone, bench):
    config = trial()
    config["recovery"] = {**config["recovery"], "type": "full"}
    result, _ = run_trial(config, bench)
    assert [rung.kind for rung in result.rungs][:2] == ["divergence", "midway"]
    assert result.rungs[0].value == alone[0].rungs[0].value
    assert result.rungs[1].value not in {result.rungs[0].value, alone[0].rungs[1].value}
    none, _ = run_trial({**config, "recovery": "none"}, bench)
    assert [rung.kind for rung in none.rungs][:2] == ["divergence", "recovered"]


def test_the_record_of_a_stopped_trial_is_complete(bench, tmp_path):
    folder = bench.run / "trials" / "7-1"
    config = TrialConfig.from_dict(trial(), "trial").to_dict()
    task = Assignment(number=7, attempt=1, recipe=None, config=config, folder=str(folder), incumbent=None,
                      gates=(gate("midway", -0.25),))  # fmt: skip
    record = run_assignment(task, bench)
    assert read_record(folder) == record
    assert record.result.stopped
    assert read_items(folder) is None
    asked = Asked(number=9, params={}, recipe=None, told=False)
    copied = copied_record(bench.run, asked, TrialConfig.from_dict(trial(), "trial"), record)
    assert copied.result.score == record.result.score
    assert told_of(copied) is None  # what is known twice counts once
    assert told_of(record).merits.keys() == {"divergence", "midway"}
    note = trial_note(record, None)
    assert "predicted from its divergence midway through the recovery: it stopped there" in note
    assert "at most 0.2500 was asked to go on" in note
    assert "| task |" not in note
