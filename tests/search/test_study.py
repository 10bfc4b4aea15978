"""The study on disk: what a reader finds in it, whose it is, and how it is made again."""

from __future__ import annotations

import optuna
import pytest
from optuna.artifacts import get_all_artifact_meta
from optuna_dashboard import get_note
from optuna_dashboard._serializer import serialize_frozen_trial

from adasearch.config import SpaceConfig
from adasearch.errors import StorageError
from adasearch.records import Failure, Record
from adasearch.search.notes import trial_note
from adasearch.search.outcomes import lag, settled
from adasearch.search.study import rebuild
from adasearch.sections import ClusterConfig, ObjectiveConfig, SamplerConfig
from tests.search.synthetic import Faults, Stop, make_space, make_study, search, table, told

pytestmark = pytest.mark.usefixtures("fakes")


def test_the_study_holds_what_a_reader_wants(tmp_path):
    search(make_study(trials=4), tmp_path)
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path / 'study.db'}")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.metric_names == ["margin, mean of the search tasks"]
    assert "4 trials" in get_note(study)
    trial = study.trials[1]
    assert trial.user_attrs["recipe"] == "obs_lora"
    assert trial.user_attrs["stderr"] == 0.01
    assert trial.user_attrs["tasks"] == {"cloze/pydoc": 0.5}
    score = trial.value
    assert trial.user_attrs["divergence"] == 1 - score
    assert trial.intermediate_values == pytest.approx({0: score - 1, 30: score - 0.01, 100: score})
    assert "recovered, 30 % of items" in get_note(optuna.Trial(study, trial._trial_id))
    assert "cloze/pydoc" in get_note(optuna.Trial(study, trial._trial_id))
    files = get_all_artifact_meta(trial, storage=study._storage)
    assert sorted(meta.filename for meta in files) == ["config.yaml", "result.json"]
    stored = [
        (tmp_path / "artifacts" / meta.artifact_id).read_bytes() for meta in files if meta.filename == "result.json"
    ]
    assert stored == [(tmp_path / "trials" / "1-1" / "result.json").read_bytes()]


def test_a_driver_killed_while_telling_tells_the_rungs_again(tmp_path, monkeypatch):
    study = make_study(trials=2)

    def die(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", die)
        with pytest.raises(Stop):
            search(study, tmp_path)
    search(study, tmp_path)
    (frozen, _) = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    assert frozen.intermediate_values == pytest.approx(
        {0: frozen.value - 1, 30: frozen.value - 0.01, 100: frozen.value}
    )


def test_a_folder_of_another_study_is_refused(tmp_path):
    search(make_study(trials=2), tmp_path)
    with pytest.raises(StorageError, match="holds another study: seed differ"):
        search(make_study(seed=8), tmp_path)
    other = SpaceConfig(name="fake", dimensions={"importance": {"choice": ["taylor", "obs"]}})
    with pytest.raises(StorageError, match="space, sampler differ"):
        search(make_study(space=other, sampler=SamplerConfig(type="random")), tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(StorageError, match="fingerprint"):
        search(make_study(seed=8), tmp_path)


@pytest.mark.parametrize("damage", ["garbage", "cut", "missing", "page"])
def test_a_damaged_database_is_made_again_from_the_records(tmp_path, damage, reference):
    study = make_study()
    search(study, tmp_path)
    before = told(tmp_path)
    path = tmp_path / "study.db"
    data = bytearray(path.read_bytes())
    if damage == "page":
        data[4096:40960] = b"\xff" * 36864
    content = {"garbage": b"not a database" * 999, "cut": bytes(data[:20000]), "page": bytes(data)}.get(damage)
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageError, match="adasearch rebuild"):
        search(study, tmp_path)
    assert rebuild(tmp_path, study, make_space(study)) == 8
    assert told(tmp_path) == before
    assert table(search(study, tmp_path)) == reference


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_made_again_goes_on_as_it_would_have(tmp_path, workers):
    study = make_study(cluster=ClusterConfig(workers=workers), sampler=SamplerConfig(type="botorch", startup=2))
    whole = table(search(study, tmp_path / "whole"))

    def observe(snapshot):
        if snapshot.done >= 5:
            raise Stop

    run = tmp_path / "run"
    with pytest.raises(Stop):
        search(study, run, observer=observe)
    assert rebuild(run, study, make_space(study)) >= 5
    assert table(search(study, run)) == whole


def failed(attempt, kind, message="no"):
    failure = Failure(kind=kind, message=message)
    return Record(number=1, attempt=attempt, recipe=None, config=None, result=None, failure=failure, environment={})


def test_what_may_pass_is_settled_only_by_the_last_attempt():
    assert settled([], 2) is None
    assert settled([failed(1, "memory")], 2) is None
    assert settled([failed(1, "memory"), failed(2, "timeout")], 2) == failed(2, "timeout")
    assert settled([failed(1, "nan")], 2) == failed(1, "nan")
    assert (lag(1, ahead=False), lag(1), lag(2), lag(8)) == (1, 2, 4, 14)


def test_a_note_shows_a_message_as_it_is():
    note = trial_note(failed(1, "error", "<script>alert(1)</script> | *x*"), None)
    assert "<script>" not in note.replace("\\<", "")
    assert "\\| \\*x\\*" in note


FRONT = ObjectiveConfig(search=("cloze/pydoc",), items=50, also=("parameters", "latency"), at_most={"parameters": 0.7})


def test_a_study_of_several_objectives_tells_all_values_and_how_far_beyond_the_limits(tmp_path):
    found = search(make_study(trials=5, objective=FRONT), tmp_path, Faults(always={3: "error"}))
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert study.metric_names[1:] == ["parameters, fraction of dense", "latency, fraction of dense"]
    for record, trial in zip(found[1:], study.trials, strict=True):
        (beyond,) = trial.constraints.values()
        shown = serialize_frozen_trial(1, trial, {})["constraints"]
        assert shown == [beyond]
        if record.result is None:
            assert (trial.number, trial.state.name, beyond) == (3, "FAIL", 1.0)
            continue
        shares = record.result.shares
        assert trial.values == [record.result.score, shares["parameters"], shares["latency"]]
        assert beyond == pytest.approx(shares["parameters"] - 0.7)
        assert trial.user_attrs["stderr latency, fraction of dense"] == 0.02
        assert trial.user_attrs["rungs"]["100"] == record.result.score
        assert trial.intermediate_values == {}
    done = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert any(t.constraints["0"] > 0 for t in done), "the test needs a trial beyond the limit"
    assert all(t.constraints["0"] <= 0 for t in study.best_trials)
    before = told(tmp_path)
    assert rebuild(tmp_path, make_study(trials=5, objective=FRONT), make_space(make_study())) == 5
    assert told(tmp_path) == before


def test_a_winner_keeps_the_limits_and_nothing_races_for_a_front(tmp_path):
    one = ObjectiveConfig(search=("cloze/pydoc",), items=50, at_most={"parameters": 0.6})
    seen = []
    found = search(make_study(trials=5, objective=one), tmp_path, observer=seen.append)
    kept = [r for r in found[1:] if r.result.shares["parameters"] <= 0.6]
    assert 0 < len(kept) < 5
    assert seen[-1].best == max(r.result.score for r in kept)
    assert make_study(objective=one).races
    assert not make_study(objective=FRONT).races
