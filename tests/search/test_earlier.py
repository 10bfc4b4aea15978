"""Earlier runs as a later study reads them: which trials are of use, what is frozen, what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import yaml

from adasearch.config import SpaceConfig
from adasearch.errors import ConfigError
from adasearch.records import Failure, Record, write_json, write_record
from adasearch.search.driver import Assignment
from adasearch.search.earlier import MIN_USABLE, freeze, gather, scored_trials
from adasearch.search.samplers import MODELLED_TRIALS
from adasearch.search.study import open_study, rebuild
from adasearch.sections import SamplerConfig
from tests.search.synthetic import BASE, DIMENSIONS, Faults, Stop, make_space, make_study, result_of, search, table

pytestmark = pytest.mark.usefixtures("fakes")

LAST = {**DIMENSIONS, "calibration.samples": {"int": [8, 32], "log": True}}


def configs_of(study, count, seed=0):
    space = make_space(study)
    rng = np.random.default_rng(seed)
    units = rng.random((count, len(space.parameters)))
    return [space.decode(space.encoding.from_units(row)).to_dict() for row in units]


def add(run, number, config, *, failure=None, attempt=1, **changes):
    """Record a trial as a worker does."""
    task = Assignment(number=number, attempt=attempt, recipe=None, config=config, folder="", incumbent=None)
    result = None if failure else dataclasses.replace(result_of(task, Faults()), **changes)
    write_record(run, Record(number=number, attempt=attempt, recipe=None, config=config, result=result,
                             failure=failure, environment={}))  # fmt: skip


def make_run(run, study=None, count=8, seed=0):
    """Leave what a search leaves, as far as a later one reads it."""
    study = study or make_study()
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(study.to_dict()))
    write_json(run / "manifest.json", {"job": "run"})
    add(run, -1, None)
    for number, config in enumerate(configs_of(study, count, seed)):
        add(run, number, config)
    return run


def later(*runs, **over):
    return make_study(warm_start=tuple(map(str, runs)), **over)


def read(study, out):
    return gather(study, make_space(study), out, "study.yaml:")


def test_a_run_of_the_same_space_is_read_whole(tmp_path):
    (found,) = read(later(make_run(tmp_path / "a")), tmp_path / "b")
    space = make_space(make_study())
    assert found.scored == 8
    assert len(found.scores) == 8
    assert found.summary == "8 of 8 scored trials are of use, 8 of them points of the space"
    for config, params, row in zip(configs_of(make_study(), 8), found.params, found.features, strict=True):
        assert space.decode(params).to_dict() == {**config, "seed": 7}
        assert row.tolist() == space.features(params).tolist()
    assert set(found.variances) == {0.01**2}


def test_failed_repeated_and_unsound_trials_are_left_out_and_stopped_ones_kept(tmp_path):
    run = make_run(tmp_path / "a")
    *_, failing, stopped = configs_of(make_study(), 10)
    add(run, 8, failing, failure=Failure(kind="memory", message="no"))
    add(run, 9, stopped, stopped=True, stderr=0.05, score=0.1)
    add(run, 10, configs_of(make_study(), 1)[0], score=0.9)  # the same trial as trial 0
    add(run, 1, configs_of(make_study(), 2)[1], attempt=2, score=0.9)
    (run / "trials" / "2-1" / "result.json").write_text("{")
    records = scored_trials(run)
    assert [r.number for r in records] == [0, 1, 3, 4, 5, 6, 7, 9]
    assert records[1].attempt == 1
    (found,) = read(later(run), tmp_path / "b")
    assert (found.scores[-1], found.variances[-1]) == (0.1, 0.05**2)


def test_what_the_later_space_cannot_say_is_as_if_it_were_inactive(tmp_path):
    dimensions = {**DIMENSIONS, "calibration.corpus": {"choice": ["c4", "wiki", "alpaca"]}}
    study = later(make_run(tmp_path / "a"), space=SpaceConfig(name="other", dimensions={**dimensions, **LAST}))
    space = make_space(study)
    (found,) = read(study, tmp_path / "b")
    samples = [config["calibration"]["samples"] for config in configs_of(make_study(), 8)]
    assert min(samples) <= 32 < max(samples)
    columns = space.encoding._columns
    for row, params, number in zip(found.features, found.params, samples, strict=True):
        assert row[columns["calibration.corpus"]].tolist() == [0, 0, 0]
        assert params is None  # the corpus is not among the choices
        expected = space.parameters["calibration.samples"].to_unit(number) if number <= 32 else 0.5
        assert row[columns["calibration.samples"]][0] == expected
    assert found.summary.endswith("0 of them points of the space")


def test_what_both_studies_fix_differently_does_not_matter(tmp_path):
    earlier = make_study(trial={**BASE, "calibration": {"corpus": "c4", "length": 64}}, seed=3)
    (found,) = read(later(make_run(tmp_path / "a", earlier)), tmp_path / "b")
    assert None not in found.params


def test_a_component_that_is_never_so_here_drops_the_trial(tmp_path):
    few = {**DIMENSIONS, "importance": {"choice": ["taylor", "obs"]}}
    run = make_run(tmp_path / "a", count=20)
    (found,) = read(later(run, space=SpaceConfig(name="few", dimensions=few)), tmp_path / "b")
    others = sum(config["importance"]["type"] == "wanda_sp" for config in configs_of(make_study(), 20))
    assert 0 < others == 20 - len(found.scores)
    assert "importance is never 'wanda_sp' in the space" in found.summary
    fixed = {k: v for k, v in DIMENSIONS.items() if not k.startswith("importance")}
    study = later(run, space=SpaceConfig(name="fixed", dimensions=fixed), trial={**BASE, "importance": "taylor"})
    (found,) = read(study, tmp_path / "b")
    assert len(found.scores) == sum(c["importance"]["type"] == "taylor" for c in configs_of(make_study(), 20))


@pytest.mark.parametrize("problem", ["missing", "no run", "compare", "few", "none of the space", "twice", "itself"])
def test_what_is_no_earlier_search_is_refused_with_its_key(tmp_path, problem):
    run = make_run(tmp_path / "a", count=MIN_USABLE)
    runs, out, space, message = [run], tmp_path / "b", {}, ""
    if problem == "missing":
        runs, message = [tmp_path / "nowhere"], "must be a run folder"
    if problem == "no run":
        (run / "config.yaml").unlink()
        message = "must be a run folder"
    if problem == "compare":
        write_json(run / "manifest.json", {"job": "compare"})
        message = "must be a search, given what adasearch compare makes"
    if problem == "few":
        (run / "trials" / "1-1" / "result.json").unlink()
        message = f"at least {MIN_USABLE} trials that are of use, has 4: 4 have a score"
    if problem == "none of the space":
        rest = {k: v for k, v in DIMENSIONS.items() if not k.startswith("importance")}
        recovered = [config["recovery"]["type"] for config in configs_of(make_study(), MIN_USABLE)]
        assert "lora" in recovered
        rest = {k: v for k, v in rest.items() if not k.startswith("recovery")}
        space = {"space": SpaceConfig(name="x", dimensions=rest)}
        message = "are none of this space"
    if problem == "twice":
        runs, message = [run, tmp_path / "b" / ".." / "a"], "given that of warm_start"
    if problem == "itself":
        out, message = run, "given this run itself"
    with pytest.raises(ConfigError, match=message) as caught:
        read(later(*runs, **space), out)
    assert str(caught.value).startswith(f"study.yaml: warm_start[{len(runs) - 1}]: ")


def test_what_was_read_is_frozen(tmp_path, caplog):
    run, out = make_run(tmp_path / "a"), tmp_path / "b"
    study = later(run)
    space = make_space(study)
    first = freeze(study, space, out)
    add(run, 8, configs_of(study, 9)[8])
    assert freeze(study, space, out) == first
    (run / "config.yaml").unlink()
    assert gather(study, space, out) == first
    (out / "prior.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(ConfigError):
        gather(study, space, out)
    (run / "config.yaml").write_text("name: a")
    assert len(freeze(study, space, out)[0].scores) == 9
    assert not caplog.records
    add(out, 0, configs_of(study, 1)[0])
    (out / "prior.json").unlink()
    freeze(study, space, out)
    assert "later proposals may differ" in caplog.text


def test_what_was_frozen_for_another_space_does_not_count(tmp_path):
    run, out = make_run(tmp_path / "a"), tmp_path / "b"
    freeze(later(run), make_space(later(run)), out)
    other = later(run, space=SpaceConfig(name="fake", dimensions=LAST))
    assert read(other, out)[0].params.count(None) > 0


def test_without_warm_start_nothing_is_read_or_written(tmp_path):
    study = make_study()
    assert freeze(study, make_space(study), tmp_path) == ()
    assert not (tmp_path / "prior.json").exists()


def test_a_sampler_that_was_chosen_says_too_what_it_takes_of_earlier_runs(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    study = later(make_run(tmp_path / "a"), trials=MODELLED_TRIALS + 1, sampler=SamplerConfig(type="auto"))
    (out := tmp_path / "b").mkdir()
    opened = open_study(out, study, make_space(study))
    opened.proposed([])
    opened.close()
    assert "sampler tpe takes start trials from earlier runs, no more" in caplog.text


@pytest.mark.parametrize("kind", ["botorch", "tpe"])
def test_a_search_begins_where_the_earlier_one_was_best_and_goes_on_alike(tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path / "a", count=10)
    study = later(run, trials=7, sampler=SamplerConfig(type=kind, startup=3))
    whole = table(search(study, tmp_path / "whole"))
    assert f"warm start from {run}: 10 of 10" in caplog.text
    assert ("takes start trials from earlier runs, no more" in caplog.text) == (kind == "tpe")
    proposals = [config for number, recipe, config, *_ in whole if recipe is None and number >= 0]
    known = [{**config, "seed": 7} for config in configs_of(study, 10)]
    assert proposals[0] in known
    assert proposals[1] not in known

    def observe(snapshot):
        if snapshot.done >= 6:
            raise Stop

    with pytest.raises(Stop):
        search(study, tmp_path / "half", observer=observe)
    add(run, 10, configs_of(study, 11)[10])
    assert rebuild(tmp_path / "half", study, make_space(study)) >= 5
    assert table(search(study, tmp_path / "half")) == whole


def test_a_search_with_a_prior_differs_from_one_without(tmp_path):
    sampler = SamplerConfig(type="botorch", startup=2)
    with_prior = later(make_run(tmp_path / "a", count=10), trials=6, sampler=sampler)
    without = make_study(trials=6, sampler=sampler)
    assert table(search(with_prior, tmp_path / "b")) != table(search(without, tmp_path / "c"))


def test_a_run_says_how_far_it_believes_the_earlier_one(tmp_path):
    from adasearch.search.prior import weights_lines

    study = later(make_run(tmp_path / "a", count=30))
    run = make_run(tmp_path / "b", study, count=12, seed=5)
    (line,) = weights_lines(run, study)
    assert line.startswith(f"{tmp_path / 'a'}: weight ")
    assert float(line.split("weight ")[1].split(",")[0]) > 0.5
    assert weights_lines(run, make_study()) == []
