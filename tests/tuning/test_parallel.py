"""Several processes that train one model together: over Gloo, on CPUs."""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adasearch.conduct import check_agreement
from adasearch.documents import fingerprint
from adasearch.errors import TrialError
from adasearch.sections import TrainingRules, ValidationConfig
from adasearch.streams import Marks
from adasearch.tuning.parallel import Alone, first_says, joined
from adasearch.tuning.snapshots import Snapshots
from tests.tuning.test_recovery import BATCH, LENGTH, cut_model, stream
from tests.tuning.test_training_memory import uneven_marks
from tests.tuning.test_training_rules import ALWAYS, PARTS, BrokenError, breaking_at, held, train


def one_sided_marks(count):
    """Return marks under which nothing counts in the first half of every batch, the share of the first process."""
    half = torch.arange(count) // (BATCH * LENGTH // 2) % 2
    return Marks(segments=torch.zeros(count, dtype=torch.int32), counted=half.bool())


ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "full": ("full", TrainingRules(), {}),
    "parts": ("full", TrainingRules(micro_batch=1, validation=ValidationConfig(every=4)), {"held": held()}),
    "marked": ("full", TrainingRules(), {"marks": uneven_marks}),
    "one_sided": ("full", TrainingRules(), {"marks": one_sided_marks}),
    "uneven": ("lora", TrainingRules(), {"batch": 3}),
    "adalora": ("adalora", TrainingRules(), {}),
    "prune_peft": ("prune_peft", TrainingRules(), {"metric": "hybrid", "begin": 0.4}),
    "adamw8bit": ("full", TrainingRules(optimizer="adamw8bit"), {}),
}

DROPPED = ("lora", TrainingRules(), {"dropout": 0.3})
"""No two processes draw alike, so one alone does otherwise."""


def run(case, group=None, **more):
    name, rules, kinds = {**CASES, "dropped": DROPPED}[case]
    tokens = stream(2 * BATCH * LENGTH)
    kinds = {**kinds, **more}
    if "marks" in kinds:
        kinds["marks"] = kinds["marks"](len(tokens))
    if kinds.pop("saves", None):
        rules = TrainingRules(save_seconds=ALWAYS)
    model, structure = cut_model()
    report = train(name, model, structure, rules, tokens, group=group, **kinds)
    return report, {key: value.clone() for key, value in model.state_dict().items()}


def work(rank, folder):
    """Do every case as one of two processes, then a run that breaks and is resumed; write what came out."""
    torch.set_num_threads(1)
    found = {}
    with joined(folder, rank, 2, "cpu", seconds=120.0) as group:
        assert (group.rank, group.size, first_says(group, 5.0 + rank)) == (rank, 2, 5.0)
        for case in CASES:
            report, weights = run(case, group)
            found[case] = (report.losses, report.validation, weights)
        kept = Snapshots(path=folder / "checkpoint.pt", parts=PARTS)
        with contextlib.suppress(BrokenError):
            run("full", group, saves=True, snapshots=kept, tell=breaking_at(6))
        group.sum(torch.zeros(1))
        report, weights = run("full", group, saves=True, snapshots=kept)
        found["resumed"] = (report.losses, report.validation, weights)
        report, weights = run("dropped", group)
        found["dropped"] = (report.losses, report.validation, weights)
        kept = Snapshots(path=folder / "dropped.pt", parts=PARTS)
        with contextlib.suppress(BrokenError):
            run("dropped", group, saves=True, snapshots=kept, tell=breaking_at(6))
        group.sum(torch.zeros(1))
        report, weights = run("dropped", group, saves=True, snapshots=kept)
        found["dropped resumed"] = (report.losses, report.validation, weights)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Return what each of two processes found."""
    folder = tmp_path_factory.mktemp("together")
    code = "import sys; from pathlib import Path; from tests.tuning.test_parallel import work; "
    code += "work(int(sys.argv[1]), Path(sys.argv[2]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(folder)], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    try:
        assert [child.wait(timeout=240) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


class TestTwoProcesses:
    @pytest.mark.parametrize("case", CASES)
    def test_do_what_one_does_with_the_same_batches(self, together, case):
        report, weights = run(case)
        for losses, validation, theirs in (found[case] for found in together):
            assert losses == pytest.approx(report.losses, rel=1e-4 if case != "prune_peft" else 1e-3)
            assert [step for step, _ in validation] == [step for step, _ in report.validation]
            for key, weight in weights.items():
                torch.testing.assert_close(theirs[key], weight, rtol=2e-2, atol=2e-3, msg=f"{case}: {key}")

    @pytest.mark.parametrize("case", [*CASES, "resumed"])
    def test_end_with_the_same_bits(self, together, case):
        one, other = (found[case] for found in together)
        assert one[:2] == other[:2]
        assert all(torch.equal(one[2][key], other[2][key]) for key in one[2])

    def test_go_on_from_the_checkpoint_of_the_first(self, together):
        for found in together:
            assert found["resumed"][0] == found["full"][0]
            assert all(torch.equal(a, found["full"][2][key]) for key, a in found["resumed"][2].items())

    def test_go_on_with_the_dropout_that_they_would_have_had(self, together):
        for found in together:
            assert found["dropped resumed"][0] == found["dropped"][0]
            assert all(torch.equal(a, found["dropped"][2][key]) for key, a in found["dropped resumed"][2].items())


class TestAgreement:
    class Second:
        """The second of two processes, of which the first has `theirs` to train."""

        rank, size = 1, 2

        def __init__(self, theirs):
            self._says = itertools.chain.from_iterable((float(int(fingerprint(x)[:12], 16)), 0.0) for x in theirs)

        def sum(self, tensor):
            tensor += next(self._says)

    def test_what_is_not_the_same_is_named(self):
        parts = {"plan": "a", "text": "b", "seed": "3"}
        check_agreement(self.Second(parts.values()), parts)
        check_agreement(Alone(), parts)
        with pytest.raises(TrialError, match="differ in plan, seed; a cut that is learnt"):
            check_agreement(self.Second(["other", "b", "4"]), parts)


class TestOneProcess:
    def test_meets_nobody(self, tmp_path):
        with joined(tmp_path / "meeting", 0, 1, "cpu") as group:
            assert isinstance(group, Alone)
            assert first_says(group, 3.5) == 3.5
        assert not (tmp_path / "meeting").exists()
