"""Finalists under rules: interrupted and resumed, with text held out, in teams, and what a display is told."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adasearch import finalize, records
from adasearch.conduct import CHECKPOINT
from adasearch.config import TrialConfig, component, load_study, study_from_dict
from adasearch.describe import describe_study
from adasearch.errors import ConfigError, TrialError
from adasearch.finalists import FinalTask
from adasearch.finalize import finish, run_final
from adasearch.records import Failure, read_finals, state_writer
from adasearch.registry import RECOVERY
from adasearch.search.executor import Outcome
from adasearch.sections import TrainingRules, ValidationConfig
from adasearch.teams import Teams, followed, state_line
from adasearch.tuning import loop
from adasearch.tuning.recovery import Progress
from adasearch.workbench import Workbench

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = {"corpus": "pydoc", "samples": 2, "length": 32}
RECOVERY_OF = {"type": "full", "tokens": 512, "length": 32, "batch": 2, "corpus": "pydoc"}
ALWAYS = TrainingRules(save_seconds=1e-9)


def study_of(checkpoint, **finalists):
    return {
        "name": "s",
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "space": {"importance": {"choice": ["magnitude"]}},
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 2, "select": 2},
        "report": {"tasks": ["cloze/pydoc"], "items": 2},
        "trial": {"calibration": SAMPLE},
        "finalize": {"recovery": RECOVERY_OF, **finalists},
    }


def bench_of(checkpoint, run):
    return Workbench(study_from_dict(study_of(checkpoint), "study:", run / "study.yaml"), run, threads=1)


@pytest.fixture(scope="module")
def bench(tiny_checkpoint, tmp_path_factory):
    return bench_of(tiny_checkpoint, tmp_path_factory.mktemp("run"))


def task_of(name, rules=ALWAYS, **changes):
    config = TrialConfig.from_dict({"calibration": SAMPLE, "importance": "magnitude"}, "trial")
    recovery = component(RECOVERY, {**RECOVERY_OF, **changes}, "recovery")
    return FinalTask(name=name, trial=0, role="finalist", config=config.to_dict(), recovery=recovery, rules=rules,
                     items=("report",))  # fmt: skip


class BrokenError(Exception):
    pass


def broken_off(task, bench):
    """Run a final whose training breaks off after its fifth step."""
    asked = loop._Course.advance

    def advance(self, batch):
        asked(self, batch)
        if self._step == 5:
            raise BrokenError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Course, "advance", advance)
        with pytest.raises(BrokenError):
            run_final(task, bench)


KILLED = """
import sys
from pathlib import Path
from adasearch.tuning import loop
from tests.test_final_training import bench_of, task_of
asked = loop._Course.advance

def advance(self, batch):
    asked(self, batch)
    if self._step == 5:
        print("five", flush=True)
        import time
        time.sleep(60)

loop._Course.advance = advance
from adasearch.finalize import run_final
run_final(task_of("killed"), bench_of(sys.argv[1], Path(sys.argv[2])))
"""


class TestInterrupted:
    def test_kill_9_in_the_middle_of_a_finalist_loses_no_step(self, tiny_checkpoint, tmp_path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tiny_checkpoint), str(tmp_path)], cwd=ROOT,
                                 env=environment, stdout=subprocess.PIPE, text=True)  # fmt: skip
        try:
            assert any(line.strip() == "five" for line in child.stdout)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        path = tmp_path / "final" / "killed" / CHECKPOINT
        assert path.is_file()
        here = bench_of(tiny_checkpoint, tmp_path)
        record = run_final(task_of("killed"), here)
        assert not path.exists()  # it has its record
        expected = run_final(task_of("whole", TrainingRules(save_seconds=None)), here)
        assert record.losses == expected.losses
        assert record.report == expected.report
        assert len(record.losses) == 8

    @pytest.mark.parametrize(
        ("part", "change"),
        [
            ("recovery", {"lr": 1e-3}),
            ("text", {"corpus": "stdlib"}),
            ("training", {}),
            ("plan", {}),
            ("base model", {}),
        ],
    )
    def test_of_another_run_is_refused_by_name(self, bench, monkeypatch, part, change):
        name = f"other-{part.replace(' ', '-')}"
        broken_off(task_of(name), bench)
        path = bench.run / "final" / name / CHECKPOINT
        before = path.read_bytes()
        task = task_of(name, **change)
        if part == "training":
            task = dataclasses.replace(task, rules=dataclasses.replace(ALWAYS, optimizer="adamw8bit"))
        if part == "plan":
            config = {**task.config, "budget": {"remove": 0.3}}
            task = dataclasses.replace(task, config=config)
        if part == "base model":
            monkeypatch.setattr(type(bench), "model_key", "another")
        with pytest.raises(TrialError, match=f"another {part}.*delete the file") as told:
            run_final(task, bench)
        assert told.value.kind == "config"
        assert str(path) in str(told.value)
        assert path.read_bytes() == before

    def test_more_time_and_smaller_parts_go_on(self, bench):
        broken_off(task_of("same"), bench)
        rules = TrainingRules(seconds=1e6, micro_batch=1, recompute=True, save_seconds=1e6)
        seen = []
        asked = loop._Course._restore
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop._Course, "_restore", lambda self, state: seen.append(asked(self, state)))
            record = run_final(task_of("same", rules), bench)
        assert len(seen) == 1
        assert len(record.losses) == 8


class TestTextHeldOut:
    def test_is_measured_and_recorded(self, bench):
        rules = TrainingRules(validation=ValidationConfig(tokens=100, every=4, share=0.2))
        record = run_final(task_of("validated", rules), bench)
        assert [step for step, _ in record.validation] == [4, 8]
        assert record in read_finals(bench.run)

    def test_is_no_part_of_what_is_trained_on(self, bench):
        """Every run of 200 bytes of one text is looked for in the other; shorter ones are phrases of many documents."""
        task = task_of("x", tokens=6000)
        validation = ValidationConfig(tokens=3000, share=0.3)
        text = bench.recovery_text(task.recovery, "pydoc", 0, validation=validation)
        assert len(text.held.tokens) == 3008
        runs = [
            {tuple(ids[i : i + 200]) for i in range(len(ids) - 199)}
            for ids in (text.tokens.tolist(), text.held.tokens.tolist())
        ]
        assert not runs[0] & runs[1]
        whole = bench.recovery_text(task.recovery, "pydoc", 0)
        assert whole.held is None
        assert not torch.equal(whole.tokens, text.tokens)

    def test_text_that_is_repeated_is_counted_and_warned_of(self, bench, tmp_path):
        """Where none is held out; of a mixture the corpus counts that is read most often."""
        small = tmp_path / "small.txt"
        small.write_text("\n\n".join(f"document {i} " * 60 for i in range(12)))
        mix = {"mix": [{"corpus": str(small), "weight": 1.0}, {"corpus": "pydoc", "weight": 1.0}]}
        told, writer = [], finalize.state_writer

        def noting(folder):
            write = writer(folder)
            return lambda *state: told.append(state[2]) or write(*state)

        def warned(name, rules):
            told.clear()
            record = run_final(task_of(name, rules, corpus=mix, tokens=65536, batch=256), bench)
            return record, {progress.warning for progress in told if progress is not None}

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finalize, "state_writer", noting)
            record, warnings = warned("repeated", TrainingRules())
            held = TrainingRules(validation=ValidationConfig(tokens=32, every=4, share=0.3))
            assert warned("held", held)[1] == {""}
        often = f"its text is gone through {record.epochs:.1f} times"
        assert record.epochs > 2
        assert warnings == {f"{often} and none is held out: it may be learnt by heart"}
        assert often.replace(" is ", " was ") in record.training
        assert run_final(task_of("once"), bench).epochs <= 1

    def test_too_little_of_it_is_told(self, bench, tmp_path):
        corpus = tmp_path / "few.txt"
        corpus.write_text("\n\n".join(f"document {i} " * 60 for i in range(12)))
        task = task_of("x", corpus=str(corpus))
        with pytest.raises(TrialError, match=r"finalize\.training\.validation: .*hold out a greater share"):
            bench.recovery_text(task.recovery, "pydoc", 0, validation=ValidationConfig(share=1e-6))


class Fake:
    """An executor that answers when it is told to."""

    def __init__(self, capacity):
        self.capacity, self.running, self.ready = capacity, {}, []

    def submit(self, key, task, *, seconds):
        assert len(self.running) < self.capacity
        self.running[key] = task

    def wait(self, _timeout):
        done, self.ready = self.ready, []
        return done

    def answer(self, key, kind=None):
        self.running.pop(key)
        failure = Failure(kind=kind, message=key) if kind else None
        self.ready.append(Outcome(key=key, value=None if kind else key, failure=failure))


class TestTeams:
    def test_begin_when_there_are_workers_for_all_of_them(self, tmp_path):
        executor = Fake(3)
        teams = Teams(executor, tmp_path)
        rules = TrainingRules(processes=2)
        for name in ("a", "b"):
            teams.submit(task_of(name, rules), seconds=1.0)
        assert teams.wait(0) == []
        assert set(executor.running) == {"a/0", "a/1"}
        meetings = {task.meeting for task in executor.running.values()}
        assert [task.rank for task in executor.running.values()] == [0, 1]
        executor.answer("a/1")
        assert teams.wait(0) == []
        assert teams.wait(0) == []
        assert set(executor.running) == {"a/0", "b/0", "b/1"}
        executor.answer("a/0")
        assert [(o.key, o.value) for o in teams.wait(0)] == [("a", "a/0")]
        assert len(meetings) == 1
        assert meetings != {executor.running["b/0"].meeting}

    def test_are_no_larger_than_there_are_workers(self, tmp_path):
        executor = Fake(1)
        teams = Teams(executor, tmp_path)
        teams.submit(task_of("a", TrainingRules(processes=4)), seconds=1.0)
        teams.wait(0)
        (task,) = executor.running.values()
        assert (task.rank, task.rules.processes, task.meeting) == (0, 1, None)

    @pytest.mark.parametrize(
        ("kinds", "counts"),
        [((None, "error"), "error"), (("error", "worker_lost"), "worker_lost"), (("memory", "error"), "memory")],
    )
    def test_fail_as_the_worker_that_was_lost_or_else_the_first_that_failed(self, tmp_path, kinds, counts):
        executor = Fake(2)
        teams = Teams(executor, tmp_path)
        teams.submit(task_of("a", TrainingRules(processes=2)), seconds=1.0)
        teams.wait(0)
        for rank, kind in enumerate(kinds):
            executor.answer(f"a/{rank}", kind)
        (outcome,) = teams.wait(0)
        assert (outcome.key, outcome.failure.kind) == ("a", counts)


class Shown:
    def __init__(self):
        self.lines, self.notes = [], []

    def note(self, text):
        self.notes.append(text)

    @contextlib.contextmanager
    def stage(self, title, total):
        yield lambda done, remark="": self.lines.append(f"{title} {done}/{total} {remark}")


class TestProgress:
    def test_is_what_the_worker_wrote_last(self, tmp_path):
        folder = tmp_path / "final" / "trial7"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"phase": "of an earlier driver", "since": 1.0}))
        shown = []
        with followed(tmp_path, ["trial7", "trial8"], shown.append, period=0.02):
            time.sleep(0.1)
            assert shown == []
            progress = Progress(step=2, steps=8, loss=3.25, tokens_per_second=5310.4, seconds_left=250.0)
            state_writer(folder)("recover", 0.25, progress)
            end = time.monotonic() + 5
            while not shown and time.monotonic() < end:
                time.sleep(0.02)
        assert shown[0] == "trial7: recover 25%, loss 3.250, 5,310 tokens/s, about 4:10 left"

    def test_a_warning_is_part_of_it(self):
        training = {"loss": 1.0, "tokens_per_second": 1.0, "seconds_left": 1.0, "warning": "no checkpoint: disk full"}
        assert "(warning: no checkpoint: disk full)" in state_line("a", {"phase": "recover", "training": training})
        assert state_line("a", {}) == "a: starting"

    def test_is_shown_while_finalists_are_made(self, bench, monkeypatch):
        """The executor's worker is this process, which comes back only when a model is made."""
        from adasearch.search.executor import InProcessExecutor

        monkeypatch.setattr(finalize, "followed", lambda *given: followed(*given, period=0.01))
        writes = records.time.time
        monkeypatch.setattr(records.time, "time", lambda: writes() * 1000)  # so that every step is written
        shown = Shown()
        executor = InProcessExecutor(lambda: lambda task: run_final(task, bench))
        failures = finish(bench.study, [task_of("shown", tokens=2048)], bench.run, executor, shown, seconds=60.0)
        assert failures == {}
        assert any("tokens/s, about" in line and "shown: recover" in line for line in shown.lines)
        assert shown.lines[-1] == "models 1/1 "


class TestStudy:
    def load(self, tmp_path, checkpoint, **finalists):
        import yaml

        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(study_of(checkpoint, **finalists)))
        return load_study(path)

    def test_rules_are_read_and_written(self, tmp_path, tiny_checkpoint):
        training = {"seconds": 60, "validation": {"every": 5}, "optimizer": "adamw8bit", "micro_batch": 1}
        study = self.load(tmp_path, tiny_checkpoint, training=training)
        assert study.finalize.training == TrainingRules(
            seconds=60.0, validation=ValidationConfig(every=5), optimizer="adamw8bit", micro_batch=1
        )
        again = study_from_dict(study.to_dict(), "again:", tmp_path / "study.yaml")
        assert again.finalize == study.finalize
        assert finalize.FinalTask(name="x", trial=0, role="finalist").rules == TrainingRules()

    @pytest.mark.parametrize(
        ("training", "key"),
        [
            ({"second": 3}, r"finalize\.training\.second: unknown key 'second'; .*seconds"),
            ({"validation": {"evry": 3}}, r"finalize\.training\.validation\.evry: unknown key"),
            ({"seconds": 0}, r"finalize\.training\.seconds"),
            ({"optimizer": "sgd"}, r"finalize\.training\.optimizer"),
            ({"validation": {"share": 1.0}}, r"finalize\.training\.validation\.share"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, tiny_checkpoint, training, key):
        with pytest.raises(ConfigError, match=key):
            self.load(tmp_path, tiny_checkpoint, training=training)

    def test_validate_says_how_finalists_are_trained(self, tmp_path, tiny_checkpoint):
        from adasearch.checks import check_study

        training = {"seconds": 60, "validation": {}, "processes": 2}
        study = self.load(tmp_path, tiny_checkpoint, training=training)
        lines = list(describe_study(study, check_study(study, "study:", tmp_path / "run")))
        assert any("adamw, about 0.0 GiB" in x and "at most 60 s, 5% of the text held out" in x for x in lines)
        for wrong, batch in (({"processes": 3}, 2), ({"processes": 2}, 1)):
            study = self.load(tmp_path, tiny_checkpoint, training=wrong, recovery={**RECOVERY_OF, "batch": batch})
            with pytest.raises(ConfigError, match=r"finalize\.training\.processes: must be at most"):
                check_study(study, "study:", tmp_path / "run")

    @pytest.mark.parametrize(("tokens", "again"), [(0, ""), (64, " (again after 33% of the recovery)")])
    def test_validate_speaks_of_a_recovery_only_where_trials_have_one(self, tmp_path, tiny_checkpoint, tokens, again):
        from adasearch.checks import check_study

        trained = {**RECOVERY_OF, "type": "lora", "tokens": tokens} if tokens else {"type": "none"}
        study = self.load(tmp_path, tiny_checkpoint)
        study = dataclasses.replace(
            study,
            trial={**study.trial, "recovery": trained},
            fidelity=dataclasses.replace(study.fidelity, divergence=32, midway=0.33),
        )
        said = describe_study(study, check_study(study, "study:", tmp_path / "run"))
        (line,) = [x for x in said if "each trial" in x]
        assert f"on 32 tokens{again}, {tokens} tokens of" in line


@pytest.mark.slow
class TestOnRay:
    def test_two_workers_train_one_finalist_as_one_does(self, tiny_checkpoint, tmp_path):
        from adasearch.search.ray_executor import RayExecutor
        from adasearch.worker import open_worker

        study = study_from_dict(study_of(tiny_checkpoint), "study:", tmp_path / "study.yaml")
        factory = functools.partial(open_worker, study, str(tmp_path), 1)
        shown = Shown()
        with RayExecutor(factory, workers=2, threads=1) as executor:
            assert (
                finish(study, [task_of("team", TrainingRules(processes=2))], tmp_path, executor, shown, seconds=300.0)
                == {}
            )
        (record,) = read_finals(tmp_path)
        alone = run_final(task_of("alone"), bench_of(tiny_checkpoint, tmp_path))
        assert record.name == "team"
        assert record.losses == pytest.approx(alone.losses, rel=1e-4)
        assert not list((tmp_path / "final" / "team").glob("meeting-*"))
        assert not (tmp_path / "final" / "team" / CHECKPOINT).exists()
