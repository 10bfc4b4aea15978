"""Gates in a search: who is asked what, that it follows from the trials told alone, and what becomes of who stops."""

from __future__ import annotations

import functools

import optuna
import pytest
from optuna_dashboard import get_note

from adasearch import report, report_rungs
from adasearch.racing import FidelityConfig, RacingConfig, in_control
from adasearch.records import DENSE, read_items, trial_folder
from adasearch.search import driver as driver_module
from adasearch.search.gates import gates_of
from adasearch.search.outcomes import lag
from adasearch.search.study import rebuild
from adasearch.sections import ClusterConfig, SamplerConfig
from tests.search.synthetic import Stop, ThreadExecutor, factory, make_space, make_study, search, table

pytestmark = pytest.mark.usefixtures("fakes")

TRIALS = 24


def study_of(workers=1, **changes):
    changes = {"racing": RacingConfig(control=0.3), "sampler": SamplerConfig(type="random"), **changes}
    return make_study(trials=TRIALS, cluster=ClusterConfig(workers=workers), **changes)


def stopped(records):
    return [record.number for record in records if record.result.stopped]


@pytest.fixture
def tasks(monkeypatch):
    """What the driver hands out, in that order."""
    made, real = [], driver_module.Assignment
    monkeypatch.setattr(driver_module, "Assignment", lambda **fields: made.append(real(**fields)) or made[-1])
    return made


@pytest.mark.parametrize("workers", [1, 2])
def test_gates_are_those_of_the_trials_told_when_a_trial_was_asked(tmp_path, tasks, workers):
    study = study_of(workers)
    executor = ThreadExecutor(factory(), 2) if workers == 2 else None
    found = search(study, tmp_path, executor=executor)
    trials = {record.number: record for record in found if record.number != DENSE}
    for task in tasks:
        if task.number == DENSE:
            assert task.gates == ()
            continue
        control = task.recipe is not None or in_control(0.3, study.seed, task.number)
        known = [trials[n] for n in range(max(0, task.number - lag(workers) + 1))]
        assert task.gates == gates_of(study, task.number, known, control=control)
        assert all(gate.stops != control for gate in task.gates)
        assert task.number >= 8 or not task.gates
        assert not (control and trials[task.number].result.stopped)
    assert any(task.gates and task.control for task in tasks)
    ended = stopped(found)
    assert len(ended) >= 2
    best = max((r for n, r in trials.items() if n not in ended), key=lambda r: r.result.score)
    assert all(1 - trials[n].result.rungs[0].value < best.result.score for n in ended)  # the divergence tells all


def test_a_search_with_gates_that_ends_goes_on_as_if_it_had_not(tmp_path):
    study = study_of()
    whole = search(study, tmp_path / "whole")
    assert stopped(whole)

    def observe(snapshot, point):
        if snapshot.done >= point:
            raise Stop

    for point in (9, 14):
        with pytest.raises(Stop):
            search(study, tmp_path / "parts", observer=functools.partial(observe, point=point))
    rebuild(tmp_path / "parts", study, make_space(study))
    parts = search(study, tmp_path / "parts")
    assert table(parts) == table(whole)
    assert stopped(parts) == stopped(whole)


def test_without_stopping_or_before_the_grace_is_over_nothing_is_asked(tmp_path, tasks):
    none = search(study_of(fidelity=FidelityConfig(stop="none")), tmp_path / "none")
    late = search(study_of(racing=RacingConfig(grace=TRIALS)), tmp_path / "late")
    assert stopped(none) == stopped(late) == []
    assert not any(task.gates for task in tasks)


def test_who_stopped_is_told_and_reported_for_what_it_is(tmp_path):
    study = study_of()
    found = search(study, tmp_path)
    ended = stopped(found)
    number = ended[0]
    record = next(r for r in found if r.number == number)
    told = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    frozen = told.trials[number]
    rung = record.result.rungs[-1]
    assert frozen.intermediate_values == pytest.approx({0: rung.merit})
    assert (frozen.state, frozen.value) == (optuna.trial.TrialState.COMPLETE, record.result.score)
    assert frozen.user_attrs["stderr"] == record.result.stderr > 0.0
    assert frozen.user_attrs["state"] == "stopped"
    assert "predicted from its divergence: it stopped there" in get_note(optuna.Trial(told, frozen._trial_id))
    assert read_items(trial_folder(tmp_path, number, 1)) is None
    last = report.leaderboard(tmp_path, study).tail(len(ended))
    assert sorted(map(int, last["trial"])) == ended
    assert set(last["state"]) == {"stopped"}
    (row,) = (row for row in report_rungs.rung_rows([r.result for r in found[1:]]) if row.label == "divergence")
    assert (row.stopped, row.trials) == (len(ended), TRIALS - len(ended))
    assert row.saved == pytest.approx(0.002 * len(ended))
    assert "stopped there" in report.report(tmp_path, study).read_text()
