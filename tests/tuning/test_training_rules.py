"""How a training is run: checkpoints, validation, memory, number formats; one class for each promise."""

import dataclasses
import errno
import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adasearch.errors import TrialError
from adasearch.registry import RECOVERY
from adasearch.sections import TrainingRules, ValidationConfig
from adasearch.streams import TrainingText
from adasearch.tuning import snapshots
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.snapshots import Snapshots
from tests.tuning.test_recovery import LENGTH, TRAINING, cut_model, options, stream, taught

PARTS = {"plan": "p", "recovery": "r", "text": "t"}
USUAL = TrainingRules()
ALWAYS = 1e-9  # seconds between checkpoints: one after every step


def held(count=4 * LENGTH, seed=9):
    return TrainingText(tokens=stream(count, seed))


def train(name, model, structure, rules=USUAL, text=None, **kinds):
    """Recover `model` in place; `kinds` are options of the recovery, or parts of its context."""
    known = {f.name for f in dataclasses.fields(RecoveryContext)}
    given = {key: kinds.pop(key) for key in list(kinds) if key in known}
    if "rank" in RECOVERY.get(name).options.__dataclass_fields__:
        kinds = {"rank": 4, **kinds}
    chosen = options(name, **kinds)
    if getattr(chosen, "distill", 0.0) > 0:
        given.setdefault("teacher", usual_teacher())
    context = RecoveryContext(**{"seed": 3, "rules": rules, **given})
    text = stream() if text is None else text
    return RECOVERY.get(name).function(model, structure, text, chosen, context)


@functools.cache
def usual_teacher():
    return taught(cut_model()[0])


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class BrokenError(Exception):
    pass


def breaking_at(step):
    def tell(progress):
        if progress.step == step:
            raise BrokenError

    return tell


@pytest.mark.parametrize("name", TRAINING)
class TestEveryRecoveryResumes:
    def test_as_it_would_have_gone_on(self, name, tmp_path):
        """Every step is a checkpoint, and the run breaks in steps 2 and 6 of 8: 5 is made twice, 6 in the last part."""
        rules = TrainingRules(save_seconds=ALWAYS, validation=ValidationConfig(every=2))
        kinds = {"dropout": 0.2} if name != "full" else {}
        whole, structure = cut_model()
        expected = train(name, whole, structure, rules, held=held(), lr=1e-2, **kinds)
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        for step in (2, 6):
            model, structure = cut_model()
            with pytest.raises(BrokenError):
                train(name, model, structure, rules, held=held(), lr=1e-2, snapshots=kept,
                      tell=breaking_at(step), **kinds)  # fmt: skip
        model, structure = cut_model()
        found = train(name, model, structure, rules, held=held(), lr=1e-2, snapshots=kept, **kinds)
        assert found.losses == expected.losses
        assert found.validation == expected.validation
        assert len(found.losses) == 8
        assert same(model, whole)

    @pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
    def test_bfloat16_too(self, name, optimizer, tmp_path, monkeypatch):
        monkeypatch.setattr("adasearch.tuning.eightbit.LEAST", 256)
        rules = TrainingRules(save_seconds=ALWAYS, optimizer=optimizer)
        whole, structure = cut_model(dtype=torch.bfloat16)
        expected = train(name, whole, structure, rules)
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        model, structure = cut_model(dtype=torch.bfloat16)
        with pytest.raises(BrokenError):
            train(name, model, structure, rules, snapshots=kept, tell=breaking_at(5))
        model, structure = cut_model(dtype=torch.bfloat16)
        assert train(name, model, structure, rules, snapshots=kept).losses == expected.losses
        assert same(model, whole)


KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from adasearch.sections import TrainingRules
from adasearch.tuning.snapshots import Snapshots
from tests.tuning.test_recovery import cut_model
from tests.tuning.test_training_rules import PARTS, train

def slowly(progress):
    print(progress.step, flush=True)
    if progress.step == 6:
        time.sleep(60)

model, structure = cut_model()
kept = Snapshots(path=Path(sys.argv[1]), parts=PARTS)
train("full", model, structure, TrainingRules(save_seconds=1e-9), snapshots=kept, tell=slowly)
"""


class TestCheckpoint:
    def test_kill_9_loses_nothing_that_was_saved(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        root = Path(__file__).resolve().parents[2]
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=root,
                                 env={**os.environ, "PYTHONPATH": str(root)})  # fmt: skip
        try:
            for line in child.stdout:
                if line.strip() == "6":
                    break
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert child.returncode == -signal.SIGKILL
        torch.set_num_threads(1)
        whole, structure = cut_model()
        expected = train("full", whole, structure)
        model, structure = cut_model()
        steps = []
        found = train("full", model, structure, snapshots=Snapshots(path=path, parts=PARTS),
                      tell=lambda progress: steps.append(progress.step))  # fmt: skip
        assert steps == [6, 7, 8]
        assert found.losses == expected.losses
        assert same(model, whole)

    def test_of_another_run_is_refused_and_stays(self, tmp_path):
        path = tmp_path / "checkpoint.pt"
        Snapshots(path=path, parts=PARTS).save({"losses": []})
        before = path.read_bytes()
        model, structure = cut_model()
        other = Snapshots(path=path, parts={**PARTS, "plan": "other", "text": "other"})
        with pytest.raises(
            TrialError, match=r"checkpoint\.pt: .* another plan, another text; .*delete the file"
        ) as told:
            train("full", model, structure, snapshots=other)
        assert (told.value.kind, told.value.phase) == ("config", "recover")
        assert path.read_bytes() == before

    def test_a_damaged_one_counts_as_none(self, tmp_path):
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        assert kept.load() is None
        kept.save({"losses": [1.0]})
        assert kept.load() == {"losses": [1.0]}
        kept.path.write_bytes(kept.path.read_bytes()[:200])
        assert kept.load() is None
        kept.path.write_bytes(b"nothing")
        assert kept.load() is None

    def test_a_full_disk_keeps_the_former_one_and_the_training_goes_on(self, tmp_path, monkeypatch):
        """The disk takes 20 000 bytes of the second and third checkpoint, and has room again for the fourth."""
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        written = []

        class Full(io.FileIO):
            room = 20_000

            def write(self, data):
                Full.room -= len(data)
                if len(written) in {2, 3} and Full.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return super().write(data)

        opened = Path.open

        def opening(path, mode="r", *rest, **kinds):
            if mode == "wb" and path.name.endswith(".tmp"):
                Full.room = 20_000
                written.append(path)
                return Full(path, "w")
            return opened(path, mode, *rest, **kinds)

        monkeypatch.setattr(Path, "open", opening)
        told, saved = [], []

        def tell(progress):
            told.append(progress.warning)
            saved.append(len(kept.load()["losses"]) if kept.path.exists() else 0)

        model, structure = cut_model()
        report = train("full", model, structure, TrainingRules(save_seconds=ALWAYS), snapshots=kept, tell=tell)
        assert len(report.losses) == 8
        assert saved == [0, 1, 1, 1, 4, 5, 6, 7]  # steps that the file holds, as each step ends
        assert [bool(warning) for warning in told] == [False, False, True, True, False, False, False, False]
        assert "no checkpoint" in told[2]
        assert "No space left on device; the former one stays" in told[2]
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_drafts_of_killed_processes_go(self, tmp_path):
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        (tmp_path / ".checkpoint.pt.12345678.tmp").write_bytes(b"half")
        kept.save({"losses": []})
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_views_of_a_large_file_are_saved_alone(self, tmp_path):
        """A model that is mapped from disk must not put its whole file into every checkpoint."""
        model, structure = cut_model()
        room = torch.zeros(2_000_000)
        begin = 0
        for parameter in model.parameters():
            view = room[begin : begin + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data, begin = view, begin + parameter.numel()
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        train("full", model, structure, TrainingRules(save_seconds=ALWAYS), snapshots=kept)
        assert kept.path.stat().st_size < 20 * begin

    def test_none_is_written_between_its_times(self, tmp_path):
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        model, structure = cut_model()
        train("full", model, structure, TrainingRules(save_seconds=3600.0), snapshots=kept)
        assert not kept.path.exists()

    def test_digests_tell_tensors_apart(self):
        a = torch.arange(6)
        given = [(a,), (a.view(2, 3),), (a.int(),), (a, None), (None, a), (a + 1,), ()]
        assert len({snapshots.digest(tensors) for tensors in given}) == len(given)
