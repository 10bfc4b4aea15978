"""What is made at the end of a run, made again, and written in which formats."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from adasearch import finalize, loading
from adasearch.config import TrialConfig, component, study_from_dict
from adasearch.errors import ConfigError, ModelError, TrialError
from adasearch.finalists import FinalTask, dense_task, made_by, to_make
from adasearch.records import FinalRecord, Speed, read_finals, read_items, write_final
from adasearch.registry import EXPORT, RECOVERY
from adasearch.report_html import _finalists
from adasearch.sections import ObjectiveConfig, TrainingRules, ValidationConfig
from adasearch.tuning.export import _verify, check_model
from adasearch.tuning.export._folder import sweep
from adasearch.winner import SELECT
from adasearch.workbench import Workbench
from tests.test_final_training import RECOVERY_OF, SAMPLE, Shown, study_of

LORA = component(RECOVERY, {"type": "lora", "tokens": 64}, "recovery")
HF, Q8 = (component(EXPORT, given, "formats") for given in ("hf", {"type": "gguf", "dtype": "q8_0"}))
SPEED = Speed(format="hf", file_bytes=1, dense_file_bytes=2, dtype="bfloat16")


@pytest.fixture
def study(tmp_path):
    return study_from_dict(study_of(tmp_path), "study:", tmp_path / "study.yaml")


def task_of(**changes):
    told = FinalTask(name="trial7", trial=7, role="finalist", config={}, recovery=LORA, formats=(HF,))
    return dataclasses.replace(told, **changes)


def record_of(study, task, **changes):
    told = FinalRecord(name=task.name, trial=task.trial, role=task.role, recipe=None, selected=(), report=(),
                       perplexity={}, parameters=10, removed=0.2, seconds={}, export="export/trial7", losses=(),
                       made=made_by(task, study), formats=("hf",))  # fmt: skip
    return dataclasses.replace(told, **changes)


class TestToMake:
    def names(self, study, task, run, record):
        write_final(run, record)
        shown = Shown()
        waiting = to_make(study, [task], run, shown)
        kept = [found.name for found in read_finals(run)]
        assert kept == ([] if waiting and not waiting[task.name].standing else [task.name])
        assert (run / "final" / task.name / "earlier.json").exists() == bool(waiting), "an earlier record is kept"
        return shown.notes

    def test_what_was_made_so_stands(self, study, tmp_path):
        rules = TrainingRules(save_seconds=1.0, micro_batch=1, processes=2)  # these change no result
        assert self.names(study, task_of(rules=rules), tmp_path, record_of(study, task_of())) == []

    @pytest.mark.parametrize(
        ("changes", "section"),
        [
            ({"recovery": component(RECOVERY, {"type": "lora", "tokens": 128}, "recovery")}, "finalize.recovery"),
            ({"rules": TrainingRules(validation=ValidationConfig())}, "finalize.training"),
            ({"formats": (HF, Q8)}, "finalize.formats"),
        ],
    )
    def test_what_would_come_out_otherwise_is_made_again_and_said(self, study, tmp_path, changes, section):
        (note,) = self.names(study, task_of(**changes), tmp_path, record_of(study, task_of()))
        assert note == f"trial7 is made again: {section} changed since it was made"

    def test_other_report_items_concern_all_models(self, study, tmp_path):
        dense = dense_task()
        other = dataclasses.replace(study, report=dataclasses.replace(study.report, items=3))
        (note,) = self.names(other, dense, tmp_path, record_of(study, dense, formats=()))
        assert "report changed" in note

    @pytest.mark.parametrize(
        ("files", "what"), [(["plan.json"], "scored"), ([], "made"), (["plan.json", "model.gguf"], "made")]
    )
    def test_other_report_items_ask_for_no_training_where_an_export_stands(self, study, tmp_path, files, what):
        (tmp_path / "export" / "1-trial7").mkdir(parents=True)
        for name in files:
            (tmp_path / "export" / "1-trial7" / name).touch()
        other = dataclasses.replace(study, report=dataclasses.replace(study.report, items=3))
        task = task_of(rules=TrainingRules(processes=2))
        (note,) = self.names(other, task, tmp_path, record_of(study, task, export="export/1-trial7"))
        assert note == f"trial7 is {what} again: report changed since it was {what}"

    def test_fewer_formats_and_a_refused_one_make_nothing_again(self, study, tmp_path):
        done = record_of(study, task_of(), formats=("hf", "gguf-q8_0"), unwritten={"gguf-q8_0": "no graph"})
        assert self.names(study, task_of(), tmp_path, done) == []
        assert self.names(study, task_of(formats=(HF, Q8)), tmp_path, done) == []

    def test_a_record_of_an_older_version_stands(self, study, tmp_path):
        assert self.names(study, task_of(), tmp_path, record_of(study, task_of(), made={}, formats=())) == []

    def test_the_best_recipe_becomes_a_finalist(self, study, tmp_path):
        self.names(study, task_of(), tmp_path, record_of(study, task_of(), role="recipe"))
        assert read_finals(tmp_path)[0].role == "finalist"
        self.names(study, task_of(role="recipe"), tmp_path, record_of(study, task_of()))
        assert read_finals(tmp_path)[0].role == "finalist", "and stays one: its export has a rank"


class TestExports:
    def exported(self, run, monkeypatch, refusals, formats=(HF, Q8)):
        written = []

        def entry(name):
            def write(_goods, folder, _options, *, overwrite):
                assert overwrite
                if name in refusals:
                    raise ModelError(refusals[name])
                written.append(str(folder.relative_to(run)))

            return SimpleNamespace(function=write)

        monkeypatch.setattr(finalize, "_goods", lambda *_: None)
        monkeypatch.setattr(finalize.registry, "EXPORT", SimpleNamespace(get=entry))
        task = task_of(formats=formats)
        record = record_of(SimpleNamespace(report=None), task, export=None, formats=())
        return written, finalize._exported(None, task, record, SimpleNamespace(run=run))

    def test_a_format_that_cannot_hold_a_model_ends_nothing(self, tmp_path, monkeypatch):
        written, record = self.exported(tmp_path, monkeypatch, {"gguf": "gguf: no graph"})
        assert written == ["export/trial7"]
        assert (record.export, record.formats) == ("export/trial7", ("hf", "gguf-q8_0"))
        assert record.unwritten == {"gguf-q8_0": "gguf: no graph"}
        write_final(tmp_path, record)
        assert finalize._scored(tmp_path, "trial7") == "scored; no export gguf-q8_0: gguf: no graph"
        study = SimpleNamespace(objective=ObjectiveConfig(search=()), seed=0)
        found = SimpleNamespace(finals=(record,), recipe=None, dense=None, best=None, study=study)
        assert "export/trial7; no gguf-q8_0: gguf: no graph" in _finalists(found)

    def test_a_model_that_no_format_holds_has_failed(self, tmp_path, monkeypatch):
        with pytest.raises(TrialError, match="a; b") as caught:
            self.exported(tmp_path, monkeypatch, {"hf": "a", "gguf": "b"})
        assert caught.value.phase == "export"

    def test_one_that_is_made_again_takes_the_place_that_its_rank_gave_it(self, tmp_path, monkeypatch):
        for name in ("2-trial7", "1-trial77"):
            (tmp_path / "export" / name).mkdir(parents=True)
        written, record = self.exported(tmp_path, monkeypatch, {})
        assert written == ["export/2-trial7", "export/trial7.gguf-q8_0"]
        write_final(tmp_path, record)
        (tmp_path / "export" / "trial7.gguf-q8_0").mkdir()
        (moved,) = finalize.place_exports(tmp_path, "acc")
        assert moved.export == "export/1-trial7"
        assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
            "1-trial7", "1-trial7.gguf-q8_0", "1-trial77",
        ]  # fmt: skip

    @pytest.mark.parametrize("measure", [True, False])
    def test_the_best_recipe_is_told_of_and_measured_like_a_finalist(self, study, tmp_path, monkeypatch, measure):
        first, second = record_of(study, task_of()), record_of(study, task_of(name="trial8", trial=8, role="recipe"))
        for record in (first, second, record_of(study, dense_task(), export=None)):
            write_final(tmp_path, record)
        told = []
        monkeypatch.setattr(finalize, "pronounce", lambda _study, _run, given: told.append(given))

        def measured(_study, _run, given, _say):
            return [dataclasses.replace(record, speeds=(SPEED,)) for record in given]

        monkeypatch.setattr(finalize, "measure_exports", measured)
        study = SimpleNamespace(finalize=SimpleNamespace(measure=measure))
        found = finalize.fill_cards(study, tmp_path, [first], print)
        assert [[record.name for record in given] for given in told] == [["trial7", "trial8"]]
        assert [(record.name, len(record.speeds)) for record in found] == [("trial7", int(measure))]

    def test_what_a_killed_process_left_is_put_in_order(self, tmp_path):
        for name in (".1-trial7.0123abcd.old", ".trial8.0123abcd.tmp", ".trial9.0123abcd.old", "trial9", ".mine"):
            (tmp_path / name).mkdir()
        sweep(tmp_path)
        sweep(tmp_path / "nothing")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "1-trial7", "trial9"]

    def test_a_model_that_a_format_never_holds_is_refused_before_anything_runs(self, monkeypatch):
        config = SimpleNamespace(rope_parameters={"rope_type": "yarn"}, vocab_size=64)
        monkeypatch.setattr("adasearch.models.read_config", lambda _: config)
        monkeypatch.setattr("adasearch.tokenization.read_tokenizer", lambda _: None)
        check_model([HF], None, "finalize.formats")
        with pytest.raises(ConfigError, match=r"finalize\.formats: gguf: rotary positions must be default .* yarn"):
            check_model([HF, Q8], None, "finalize.formats")
        config.rope_parameters = {"rope_type": "llama3"}
        check_model([HF, Q8], None, "finalize.formats")


def test_a_model_is_scored_again_from_its_export(tmp_path, tiny_checkpoint, monkeypatch):
    """Other items give other scores, and nothing is tuned; with the old ones the scores are those it had."""
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    told = study_of(tiny_checkpoint)
    study = study_from_dict(told, "study:", tmp_path / "study.yaml")
    bench = Workbench(study, tmp_path, threads=1)
    config = TrialConfig.from_dict({"calibration": SAMPLE, "importance": "magnitude"}, "trial").to_dict()
    recovery = component(RECOVERY, RECOVERY_OF, "recovery")
    task = task_of(config=config, recovery=recovery)
    first = finalize.run_final(task, bench)
    values = read_items(tmp_path / "final" / "trial7")
    shown = Shown()
    for items in (6, 2):
        report = {**told["report"], "items": items, "perplexity": ["pydoc"], "perplexity_tokens": 600, "windows": [128]}
        other = study_from_dict({**told, "report": report}, "study:", tmp_path / "study.yaml")
        (again,) = to_make(other, [task], tmp_path, shown).values()
        monkeypatch.setattr(finalize, "_made", None)
        record = finalize.run_final(again, Workbench(other, tmp_path, threads=1))
        assert read_finals(tmp_path) == [record]
        assert record.report[0].n == items
        assert record.selected == first.selected
        found = read_items(tmp_path / "final" / "trial7")
        assert found.keys() == values.keys()
        assert (found[f"cloze/pydoc{SELECT}"] == values[f"cloze/pydoc{SELECT}"]).all()
        assert (record.losses, record.export, record.parameters) == (first.losses, first.export, first.parameters)
        card = (tmp_path / "export" / "trial7" / "README.md").read_text()
        assert f"| cloze/pydoc | {items} |" in card
        assert f"| pydoc@128 | {record.perplexity['pydoc@128']:.3f} |" in card
    (found,), (wanted,) = record.report, first.report
    assert (found.acc, found.acc_norm) == (wanted.acc, wanted.acc_norm)
    assert (found.margin, found.log_score) == pytest.approx((wanted.margin, wanted.log_score), abs=1e-6)
    assert loading.verify(tmp_path / "export" / "trial7", fresh=False).sound
    assert not to_make(other, [task], tmp_path, shown)
