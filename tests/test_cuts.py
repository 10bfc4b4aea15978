"""The cut of a final model that is broken off: taken up again, not made again."""

import dataclasses

import pytest
import torch

from adasearch import checks, cuts
from adasearch.conduct import CHECKPOINT, Conduct
from adasearch.config import TrialConfig, study_from_dict
from adasearch.finalize import run_final
from adasearch.pruning.schedule import gates
from adasearch.sections import TrainingRules
from adasearch.trial import Clock, prune
from adasearch.tuning.snapshots import Snapshots
from tests.test_final_training import ALWAYS, SAMPLE, bench_of, broken_off, study_of, task_of

LEARNT = {"type": "gates", "tokens": 256, "length": 32, "batch": 2, "corpus": "pydoc"}
NEVER = TrainingRules(save_seconds=1e9)


@pytest.fixture(scope="module")
def bench(tiny_checkpoint, tmp_path_factory):
    return bench_of(tiny_checkpoint, tmp_path_factory.mktemp("run"))


def learnt(name, rules=ALWAYS, **sections):
    task = task_of(name, rules)
    config = TrialConfig.from_dict({"calibration": SAMPLE, "schedule": LEARNT, **sections}, "trial")
    return dataclasses.replace(task, config=config.to_dict())


def none_made(*_):
    raise AssertionError("a cut must not be made again")


def kept(bench, name):
    return [path.name for path in (bench.run / "final" / name).glob(cuts.PATTERN)]


def assert_opened_the_same(config, bench, folder):
    conduct = Conduct(rules=ALWAYS, folder=folder)
    made, _ = cuts.obtain(config, bench, Clock(), conduct)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "prune", none_made)
        found, _ = cuts.obtain(config, bench, Clock(), conduct)
    assert found.plan == made.plan
    assert found.structure == made.structure
    assert found.base.shape == made.base.shape
    assert str(found.model) == str(made.model)
    assert found.model.config.to_dict() == made.model.config.to_dict()
    theirs = dict(made.model.state_dict())
    assert all(torch.equal(weight, theirs.pop(name)) for name, weight in found.model.state_dict().items())
    assert not theirs


class TestBrokenOff:
    def test_a_learnt_cut_is_not_learnt_again(self, bench, monkeypatch):
        broken_off(learnt("learnt"), bench)
        assert len(kept(bench, "learnt")) == 1
        expected = run_final(learnt("whole", TrainingRules(save_seconds=None)), bench)
        monkeypatch.setattr(cuts, "prune", none_made)
        record = run_final(learnt("learnt"), bench)
        assert record.losses == expected.losses
        assert record.report == expected.report
        assert record.parameters == expected.parameters
        assert not kept(bench, "learnt")
        assert not kept(bench, "whole")

    def test_a_cut_that_comes_out_otherwise_the_second_time_does_no_harm(self, bench, monkeypatch):
        """As on a GPU, where sums are not always made in the same order: the checkpoint is of the cut that was kept."""
        task = learnt("other")
        broken_off(task, bench)
        asked, config = gates.prior, TrialConfig.from_dict(task.config, "trial")
        monkeypatch.setattr(gates, "prior", lambda *a: {n: 1 - part for n, part in asked(*a).items()})
        conduct = Conduct(rules=ALWAYS, folder=bench.run / "final" / "other")
        first, _ = cuts.obtain(config, bench, Clock(), conduct)
        assert prune(config, bench, Clock()).plan != first.plan
        assert len(run_final(learnt("other"), bench).losses) == 8

    def test_of_another_configuration_it_is_made_anew_and_the_first_stays(self, bench):
        broken_off(learnt("two"), bench)
        (bench.run / "final" / "two" / CHECKPOINT).unlink()
        (first,) = kept(bench, "two")
        broken_off(learnt("two", importance="magnitude", budget={"remove": 0.3}), bench)
        assert len(kept(bench, "two")) == 2
        assert first in kept(bench, "two")

    def test_a_damaged_one_counts_as_none(self, bench):
        broken_off(learnt("damaged"), bench)
        (name,) = kept(bench, "damaged")
        path = bench.run / "final" / "damaged" / name
        path.write_bytes(path.read_bytes()[:1000])
        assert len(run_final(learnt("damaged"), bench).losses) == 8


class TestKept:
    @pytest.mark.parametrize(("rules", "rank"), [(NEVER, 0), (TrainingRules(save_seconds=None), 0), (ALWAYS, 1)])
    def test_not_where_it_was_quick_nor_by_every_process(self, bench, tmp_path, rules, rank):
        config = TrialConfig.from_dict(learnt("x").config, "trial")
        cuts.obtain(config, bench, Clock(), Conduct(rules=rules, folder=tmp_path, rank=rank))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "sections",
        [
            {"compensation": "bias", "importance": "wanda_sp", "schedule": "one_shot"},
            {"hidden": {"type": "magnitude", "remove": 0.2}, "compensation": "affine_out", "schedule": "sequential"},
            {"hidden": {**LEARNT, "type": "pat", "remove": 0.2, "inner": 4, "rank": 2}},
        ],
    )
    def test_whatever_was_cut_is_the_same_model_once_opened(self, bench, tmp_path, sections):
        config = TrialConfig.from_dict(learnt("x", **sections).config, "trial")
        assert_opened_the_same(config, bench, tmp_path)

    def test_a_full_disk_is_told_and_ends_nothing(self, bench, tmp_path, monkeypatch):
        monkeypatch.setattr(Snapshots, "save", lambda *_: "no space left")
        config = TrialConfig.from_dict(learnt("x").config, "trial")
        found, conduct = cuts.obtain(config, bench, Clock(), Conduct(rules=ALWAYS, folder=tmp_path))
        assert found.plan.removed > 0
        assert conduct.notice == "no cut: no space left"


def test_the_disk_must_have_room_for_a_cut_that_is_learnt(tiny_checkpoint, tmp_path, monkeypatch):
    def needed(schedule):
        data = study_of(tiny_checkpoint)
        data["trial"] = {**data["trial"], "schedule": schedule}
        study = study_from_dict(data, "study:", tmp_path / "study.yaml")
        kept = []
        monkeypatch.setattr(checks, "_check_disk", lambda *asked: kept.append(asked[-1]))
        checks.check_study(study, "study:", tmp_path / "run")
        return kept[0]

    assert needed(LEARNT) == needed("one_shot") + 1
