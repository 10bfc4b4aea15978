"""The loop against a synthetic objective: order, resume, failures. No model, no Ray."""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from adasearch import records as records_module
from adasearch.config import SpaceConfig
from adasearch.errors import ConfigError, NoTrialError, StorageError
from adasearch.racing import RacingConfig, in_control
from adasearch.records import DENSE, Record, read_record, read_records
from adasearch.search import outcomes
from adasearch.search import study as study_module
from adasearch.search.executor import InProcessExecutor, Outcome
from adasearch.sections import ClusterConfig, LimitsConfig, SamplerConfig
from tests.search.synthetic import Faults, Stop, ThreadExecutor, factory, make_study, search, table, told

pytestmark = pytest.mark.usefixtures("fakes")


def attributes(run):
    query = "SELECT trials.number, key, value_json FROM trial_user_attributes JOIN trials USING (trial_id)"
    with sqlite3.connect(run / "study.db") as connection:
        return {(number, key): text for number, key, text in connection.execute(query)}


def test_all_trials_are_run_recorded_and_told(tmp_path, reference):
    seen = []
    found = search(make_study(), tmp_path, observer=seen.append)
    assert table(found) == reference
    assert [r.number for r in found] == [DENSE, *range(8)]
    assert found[1].recipe == "taylor_plain"
    assert found[2].recipe == "obs_lora"
    assert found[3].recipe is None
    assert told(tmp_path) == [(n, "COMPLETE") for n in range(8)]
    assert [r.config for r in read_records(tmp_path)] == [r.config for r in found]
    last = seen[-1]
    assert (last.total, last.done, last.failed, last.running) == (8, 8, 0, ())
    assert last.best == max(r.result.score for r in found[1:])
    assert last.dense == found[0].result.score
    assert any("recipe elsewhere is not in the space" in (s.last or "") for s in seen)
    assert any(s.running for s in seen)
    assert all(r.config["seed"] == 7 for r in found[1:])


@pytest.mark.parametrize("sampler", ["tpe", "botorch"])
def test_proposals_do_not_depend_on_who_finishes_first(tmp_path, sampler):
    study = make_study(sampler=SamplerConfig(type=sampler, startup=3), cluster=ClusterConfig(workers=2))
    runs = []
    for name in ("one", "two"):
        executor = ThreadExecutor(factory(Faults(delay=0.06)), 2)
        runs.append(table(search(study, tmp_path / name, executor=executor)))
        executor.close()
    assert runs[0] == runs[1]


def test_a_search_that_ends_between_events_goes_on_as_if_it_had_not(tmp_path, reference):
    def observe(snapshot, point):
        if snapshot.done >= point:
            raise Stop

    log = tmp_path / "log"
    for point in (1, 4, 7, 8):
        stop = functools.partial(observe, point=point)
        with pytest.raises(Stop):
            search(make_study(), tmp_path / "run", Faults(log=str(log)), observer=stop)
        assert not (tmp_path / "run" / "lease.json").exists()
    assert table(search(make_study(), tmp_path / "run", Faults(log=str(log)))) == reference
    numbers = [line.rpartition("-")[0] for line in log.read_text().split()]
    assert sorted(numbers, key=int) == [str(n) for n in range(-1, 8)]


PLACES = {
    "ask": (study_module.SearchStudy, "add", False),
    "asked": (study_module.SearchStudy, "add", True),
    "attributes": (optuna.Trial, "set_user_attr", False),
    "note": (study_module, "save_note", False),
    "artifacts": (study_module, "upload_artifact", False),
    "tell": (optuna.Study, "tell", False),
    "told": (optuna.Study, "tell", True),
    "write": (outcomes, "write_json", False),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_driver_that_ends_inside_of_a_step_goes_on_as_if_it_had_not(tmp_path, reference, monkeypatch, place):
    target, name, after = PLACES[place]
    real, calls = getattr(target, name), []

    def ending(*args, **kwargs):
        calls.append(name)
        last = len(calls) in {1, 7}
        if last and not after:
            raise Stop
        answer = real(*args, **kwargs)
        if last:
            raise Stop
        return answer

    monkeypatch.setattr(target, name, ending)
    for _ in range(2):
        with pytest.raises(Stop):
            search(make_study(), tmp_path)
    assert table(search(make_study(), tmp_path)) == reference
    assert told(tmp_path) == [(n, "COMPLETE") for n in range(8)]


def test_a_search_of_two_workers_that_ends_goes_on_as_if_it_had_not(tmp_path):
    study = make_study(cluster=ClusterConfig(workers=2), sampler=SamplerConfig(type="botorch", startup=2), trials=8)
    make = factory(Faults(delay=0.03))
    whole = table(search(study, tmp_path / "whole", executor=ThreadExecutor(make, 2)))

    def observe(snapshot, limit):
        if snapshot.done >= limit:
            raise Stop

    for limit in (2, 5, 8):
        executor = ThreadExecutor(make, 2)
        with pytest.raises(Stop):
            search(study, tmp_path / "parts", executor=executor, observer=functools.partial(observe, limit=limit))
        assert executor.closed
    assert table(search(study, tmp_path / "parts", executor=ThreadExecutor(make, 2))) == whole


CHILD = """
import sys
from pathlib import Path
from tests.search import synthetic
synthetic.install()
from adasearch.search.driver import run_search
from adasearch.search.executor import InProcessExecutor
study = synthetic.make_study()
executor = InProcessExecutor(synthetic.factory(synthetic.Faults(**eval(sys.argv[2]))))
run_search(study, synthetic.make_space(study), Path(sys.argv[1]), executor, lambda s: None)
"""


def child(run, faults):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(run), repr(faults)], env=environment, cwd=root)


def test_kill_9_loses_nothing_and_the_lease_is_taken_over(tmp_path, reference):
    log = tmp_path / "log"
    process = child(tmp_path / "run", {"once": {5: "kill"}, "log": str(log)})
    assert process.wait(120) == -signal.SIGKILL
    assert (tmp_path / "run" / "lease.json").exists()
    assert table(search(make_study(), tmp_path / "run", Faults(log=str(log)))) == reference
    runs = log.read_text().split()
    assert len(runs) == len(set(runs)) == 10
    assert "5-2" in runs


def test_a_second_driver_is_refused_and_terminate_leaves_a_run_that_goes_on(tmp_path, reference):
    process = child(tmp_path, {"delay": 1.0})
    deadline = time.monotonic() + 120
    while len(read_records(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(StorageError, match=rf"held by process {process.pid} on host"):
        search(make_study(), tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in {1, 130, -signal.SIGINT}
    assert not (tmp_path / "lease.json").exists()
    assert table(search(make_study(), tmp_path)) == reference


@pytest.mark.parametrize("kind", ["nan", "error", "config"])
def test_what_would_fail_again_is_told_as_failed_and_not_retried(tmp_path, kind):
    found = search(make_study(trials=6), tmp_path, Faults(always={4: kind}))
    record = next(r for r in found if r.number == 4)
    assert (record.attempt, record.failure.kind, record.result) == (1, kind, None)
    assert told(tmp_path)[4] == (4, "FAIL")
    assert kind in attributes(tmp_path)[4, "failure"]
    assert len(found) == 7
    assert read_record(tmp_path / "trials" / "4-1") == record
    assert "\x1b" not in record.failure.message


@pytest.mark.parametrize("kind", ["memory", "timeout", "worker_lost"])
def test_what_may_pass_is_tried_again_as_often_as_allowed(tmp_path, kind, reference):
    found = search(make_study(), tmp_path / "once", Faults(once={3: kind, -1: kind}))
    assert table(found) == reference
    assert {r.number: r.attempt for r in found}[3] == 2
    found = search(make_study(), tmp_path / "always", Faults(always={3: kind}))
    assert next(r for r in found if r.number == 3).attempt == 2
    assert told(tmp_path / "always")[3] == (3, "FAIL")


def test_a_record_written_before_the_worker_was_lost_counts(tmp_path, reference):
    found = search(make_study(), tmp_path, Faults(once={3: "after_record"}))
    assert table(found) == reference
    assert all(r.attempt == 1 for r in found)


def test_a_search_whose_trials_mostly_fail_stops_and_says_why(tmp_path):
    bad = Faults(always=dict.fromkeys(range(2, 8), "error"))
    with pytest.raises(NoTrialError, match=r"of the last 5 trials failed.*error.*do not fit"):
        search(make_study(), tmp_path, bad)
    assert len(told(tmp_path)) == 5
    assert len(search(make_study(), tmp_path)) == 9


def test_a_search_without_any_success_is_an_error(tmp_path):
    study = make_study(trials=3, limits=LimitsConfig(failed_share=1.0))
    with pytest.raises(NoTrialError, match=r"none of 3 trials succeeded.*nan"):
        search(study, tmp_path, Faults(every="nan"))


def test_more_trials_may_be_asked_for_later(tmp_path, reference):
    search(make_study(trials=4), tmp_path)
    assert table(search(make_study(trials=8), tmp_path)) == reference
    assert table(search(make_study(trials=4), tmp_path)) == reference


@pytest.mark.parametrize("nth", [3, 36])
def test_a_full_disk_stops_the_search_and_leaves_it_to_be_gone_on_with(tmp_path, monkeypatch, nth, reference):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(records_module.os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        search(make_study(), tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    assert table(search(make_study(), tmp_path)) == reference


def test_equal_configurations_are_run_once(tmp_path):
    lines = {"importance": {"choice": ["taylor", "obs"]}, "calibration.draw": {"int": [0, 3]}}
    study = make_study(
        space=SpaceConfig(name="small", dimensions=lines), sampler=SamplerConfig(type="random"), trials=9
    )
    log = tmp_path / "log"
    found = search(study, tmp_path / "run", Faults(log=str(log)))
    assert len(found) == 10
    again = [r for r in found if r.result.notes.get("same_trial_as") is not None]
    assert 2 <= len(again) <= 6
    assert len(log.read_text().split()) == 10 - len(again)
    assert {r.result.score for r in again} <= {r.result.score for r in found if r not in again}
    assert (tmp_path / "run" / "trials" / f"{again[0].number}-1" / "items.npz").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_ends_when_every_point_of_its_space_has_been_tried(tmp_path, workers):
    lines = {"importance": {"choice": ["taylor", "obs"]}, "importance.taylor.grain": {"choice": ["element", "vector"]}}
    study = make_study(
        space=SpaceConfig(name="tiny", dimensions=lines),
        sampler=SamplerConfig(type="evolution", startup=2),
        trials=20,
        recipes={},
        cluster=ClusterConfig(workers=workers),
    )
    seen, log = [], tmp_path / "log"
    found = search(study, tmp_path / "run", Faults(log=str(log), always={1: "error"}), observer=seen.append)
    assert [r.number for r in found] == [DENSE, 0, 1, 2]
    assert len({str(r.config["importance"]) for r in found[1:]}) == 3
    assert told(tmp_path / "run")[1] == (1, "FAIL")
    assert sum((s.last or "").startswith("the search ended after 3 of 20 trials: all 3 points") for s in seen) == 1
    assert (seen[-1].total, seen[-1].done) == (3, 3)
    assert table(search(study, tmp_path / "run", Faults(log=str(log)))) == table(found)
    assert len(log.read_text().split()) == 4


def test_a_search_says_once_what_proposes_and_why(tmp_path):
    seen = []
    search(make_study(trials=3, sampler=SamplerConfig(startup=3)), tmp_path, observer=seen.append)
    lines = [s.last for s in seen if (s.last or "").startswith("sampler: ")]
    assert lines == ["sampler: botorch (3 trials of 15 features: a model of the score and its noise)"]


@pytest.mark.parametrize(("score", "stderr"), [(math.inf, 0.1), (-math.inf, 0.1), (math.nan, 0.1), (0.5, math.nan)])
def test_a_score_that_is_no_number_is_a_failure_with_its_reason(tmp_path, score, stderr):
    result = dataclasses.replace(search(make_study(trials=1), tmp_path / "run")[1].result, score=score, stderr=stderr)
    asked = outcomes.Asked(number=5, params={}, recipe=None, told=False)
    given = Record(
        number=5, attempt=1, recipe=None, config=None, result=result, failure=None, environment={"host": "here"}
    )
    outcome = Outcome(key="5-1", value=given, failure=None)
    found = outcomes.sound_record(tmp_path, asked, 1, None, outcome)
    assert found.result is None
    assert found.failure.kind == "nan"
    assert f"{score} ± {stderr}" in found.failure.message
    assert read_record(tmp_path / "trials" / "5-1") == found


def test_a_trial_races_against_the_best_one_told_when_it_was_asked(tmp_path):
    tasks = []

    def make():
        worker = factory()()

        def work(task):
            tasks.append(task)
            return worker(task)

        return work

    study = make_study(racing=RacingConfig(grace=4, control=0.5))
    found = search(study, tmp_path, executor=InProcessExecutor(make))
    scores = {r.number: r.result.score for r in found}
    for task in tasks:
        if task.number < 4:
            assert task.incumbent is None
        else:
            best = max(range(task.number), key=scores.__getitem__)
            assert task.incumbent == str(tmp_path.resolve() / "trials" / f"{best}-1")
    drawn = {task.number: task.control for task in tasks if task.number >= 0}
    assert drawn == {n: n < 2 or in_control(0.5, study.seed, n) for n in range(8)}  # two are recipes
    assert set(drawn.values()) == {True, False}


def test_an_error_that_concerns_all_trials_ends_the_search(tmp_path):
    def make():
        raise ConfigError("study.yaml: model.name", "must be a model")

    executor = InProcessExecutor(make)
    with pytest.raises(ConfigError, match=r"model\.name"):
        search(make_study(), tmp_path, executor=executor)


def test_records_are_frozen_and_complete(tmp_path):
    found = search(make_study(trials=3), tmp_path)
    for record in found:
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.number = 3
        assert read_record(tmp_path / "trials" / f"{'dense' if record.number < 0 else record.number}-1") == record
