"""Text held out of a recovery, the best weights, and runs that end early: by patience or by time."""

import itertools
import math
import time

import pytest
import torch

from adasearch import data, streams
from adasearch.errors import TrialError
from adasearch.sections import Mix, MixPart, TrainingRules, ValidationConfig
from adasearch.streams import TrainingText
from adasearch.tuning import loop
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.snapshots import Snapshots
from adasearch.tuning.training import Adapters, TrainingConfig
from adasearch.workbench import _kept
from tests import tiny
from tests.tuning.test_recovery import BATCH, LENGTH, cut_model, plain_loss, stream
from tests.tuning.test_training_rules import PARTS, held, train


def windows(text, length=24):
    """Return all runs of `length` tokens inside sequences of a text."""
    ids = text.tokens.tolist()
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}


class TestTextHeldOut:
    @pytest.mark.parametrize("packing", ["stream", "documents"])
    def test_shares_no_document_with_what_is_trained_on(self, packing, tmp_path):
        """Every document repeats a number that no other has; both corpora of the mixture hold all of them."""
        documents = [f"{i:04d} " * 100 for i in range(60)]
        for name in ("one.txt", "two.txt"):
            (tmp_path / name).write_text("\n\n".join(documents))
        mix = Mix(mix=tuple(MixPart(corpus=str(tmp_path / name), weight=1.0) for name in ("one.txt", "two.txt")))
        reading = streams.Reading(text=mix, tokens=20000, length=48, seed=1, packing=packing)
        tokenizer = tiny.tiny_tokenizer()
        found = [
            streams.training_text(tokenizer, reading, guard=_kept(None, 0.3, held=is_held)) for is_held in (False, True)
        ]
        numbers = []
        for text in found:
            letters = tokenizer.decode(text.tokens.tolist())
            numbers.append({number for number in (f"{i:04d}" for i in range(60)) if f"{number} {number} " in letters})
        assert min(map(len, numbers)) >= 3
        assert not numbers[0] & numbers[1]
        assert not windows(found[0]) & windows(found[1])

    def test_the_share_is_met_and_does_not_follow_the_parts(self):
        texts = [f"document {i}" for i in range(4000)]
        taken = [text for text in texts if data.held_out(text, 0.2)]
        assert len(taken) / len(texts) == pytest.approx(0.2, abs=0.03)
        fit = sum(data.part_of(text) == "fit" for text in taken)
        assert fit / len(taken) == pytest.approx(0.5, abs=0.06)

    def test_what_a_guard_takes_is_in_neither(self):
        left_out = [_kept(lambda text: text == "spoilt", 0.5, held=is_held) for is_held in (False, True)]
        assert all(guard("spoilt") for guard in left_out)
        assert sum(guard("sound") for guard in left_out) == 1
        assert _kept(None, None) is None

    def test_the_loss_is_that_of_all_its_tokens(self):
        model, structure = cut_model()
        text = held(5 * LENGTH)
        rules = TrainingRules(validation=ValidationConfig(every=3, patience=None))
        with torch.no_grad():
            before = float(plain_loss(model, text.tokens.view(-1, LENGTH)))
        report = train("full", model, structure, rules, held=text, lr=1e-12)
        assert [step for step, _ in report.validation] == [3, 6, 8]
        assert all(loss == pytest.approx(before, rel=1e-5) for _, loss in report.validation)

    def test_marks_count_there_too(self):
        model, structure = cut_model()
        tokens = stream(4 * LENGTH, seed=2)
        counted = torch.rand(len(tokens)) < 0.5
        counted[LENGTH : 2 * LENGTH] = False  # a whole sequence
        marks = streams.Marks(segments=torch.zeros(len(tokens), dtype=torch.int32), counted=counted)
        rules = TrainingRules(validation=ValidationConfig(every=8), micro_batch=1)
        report = train("full", model, structure, rules, held=TrainingText(tokens=tokens, marks=marks), lr=1e-12)
        lines, count = tokens.view(-1, LENGTH), counted.view(-1, LENGTH)
        with torch.no_grad():
            logp = model(input_ids=lines).logits.log_softmax(-1)[:, :-1]
        picked = logp.gather(2, lines[:, 1:, None])[..., 0][count[:, 1:]]
        assert report.validation == ((8, pytest.approx(-float(picked.mean()), rel=1e-5)),)


class TestBestWeights:
    def test_are_kept_in_the_memory_of_the_last(self):
        watch = loop._Watch(RecoveryContext(seed=0, held=held(), rules=TrainingRules(validation=ValidationConfig())))
        weights = [torch.ones(3), torch.zeros(2, 2)]
        watch.keep(weights, {"state": 1})
        places = [w.data_ptr() for w in watch.kept["weights"]]
        weights[0] *= 5
        assert watch.kept["weights"][0].tolist() == [1, 1, 1]
        watch.keep(weights, {"state": 2})
        assert watch.kept["weights"][0].tolist() == [5, 5, 5]
        assert [w.data_ptr() for w in watch.kept["weights"]] == places
        assert watch.kept["adapters"] == {"state": 2}

    @pytest.mark.parametrize("name", ["full", "lora"])
    def test_are_kept_where_the_loss_rises_again(self, name):
        """The text held out is of another kind, so that training on the stream soon makes its loss worse."""
        other = TrainingText(tokens=torch.arange(4 * LENGTH) % 5 + 200)
        rules = TrainingRules(validation=ValidationConfig(every=1, patience=None))
        model, structure = cut_model()
        report = train(name, model, structure, rules, held=other, lr=2e-2, warmup=0.5)
        losses = [loss for _, loss in report.validation]
        assert len(losses) == 8
        assert min(losses) < losses[-1]
        assert report.best == 1 + losses.index(min(losses))
        with torch.no_grad():
            now = float(plain_loss(model, other.tokens.view(-1, LENGTH)))
        assert now == pytest.approx(min(losses), rel=1e-4)

    def test_patience_ends_the_run(self):
        other = TrainingText(tokens=torch.arange(4 * LENGTH) % 5 + 200)
        rules = TrainingRules(validation=ValidationConfig(every=1, patience=2))
        model, structure = cut_model()
        report = train("full", model, structure, rules, held=other, lr=2e-2, warmup=0.0)
        losses = [loss for _, loss in report.validation]
        best = losses.index(min(losses))
        assert len(losses) == len(report.losses) == best + 3 < 8
        assert "2 measurements" in report.ended
        assert report.tokens == len(losses) * BATCH * LENGTH

    def test_a_recovery_that_takes_away_is_not_ended_before_it_has(self):
        """AdaLoRA's budget is met at 70 % of the steps: no earlier weights are kept, and no patience counts before."""
        other = TrainingText(tokens=torch.arange(4 * LENGTH) % 5 + 200)
        rules = TrainingRules(validation=ValidationConfig(every=1, patience=1))
        model, structure = cut_model()
        report = train("adalora", model, structure, rules, held=other, lr=5e-2, end=0.7, warmup=0.0)
        assert len(report.losses) >= 6
        assert report.best in {0, 6, 7, 8}

    def test_the_best_have_the_state_that_belongs_to_them(self):
        """What rides along changes with every step; after the run it is as it was where the loss was least."""

        class Remembering(Adapters):
            def __init__(self):
                super().__init__({})
                self.steps = []

            def stepped(self, step, ids, masters):
                self.steps.append(step)

            def state(self):
                return {"steps": self.steps}

            def restore(self, state):
                self.steps = list(state["steps"])

        model, _ = cut_model()
        model.requires_grad_(True)
        config = TrainingConfig(tokens=8 * BATCH * LENGTH, length=LENGTH, batch=BATCH, lr=2e-2, warmup=0.0)
        other = TrainingText(tokens=torch.arange(4 * LENGTH) % 5 + 200)
        rules = TrainingRules(validation=ValidationConfig(every=1, patience=None))
        riding = Remembering()
        report = loop.train(model, loop.Masters(list(model.parameters()), config), stream(), config,
                            RecoveryContext(rules=rules, held=other), riding)  # fmt: skip
        assert 0 < report.best < 8
        assert riding.steps == list(range(1, report.best + 1))


class TestTime:
    def clock(self, monkeypatch, seconds):
        """Let every look at the clock take `seconds`."""
        ticks = itertools.count()
        monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks) * seconds)

    def test_ends_the_run_and_the_rate_is_down_by_then(self, monkeypatch):
        self.clock(monkeypatch, 1.0)
        rates = []
        asked = loop.learning_rate

        def rate(step, config):
            rates.append(asked(step, config))
            return rates[-1]

        monkeypatch.setattr(loop, "learning_rate", rate)
        model, structure = cut_model()
        report = train("full", model, structure, TrainingRules(seconds=40.0, save_seconds=None), lr=1e-3,
                       warmup=0.1, text=stream(2000))  # fmt: skip
        assert len(report.losses) == 8  # so long a time does not matter
        rates.clear()
        self.clock(monkeypatch, 1.0)
        short = train("full", model, structure, TrainingRules(seconds=8.0, save_seconds=None), lr=1e-3)
        assert 1 < len(short.losses) < 8
        assert short.ended == "its time of 8 s was over"
        assert short.tokens == len(short.losses) * BATCH * LENGTH
        assert rates[-1] < 0.3 * max(rates)

    def test_a_run_that_is_given_more_goes_on(self, monkeypatch, tmp_path):
        kept = Snapshots(path=tmp_path / "checkpoint.pt", parts=PARTS)
        for limit, ended in ((8.0, "its time of 8 s was over"), (8.5, "its time of 8.5 s was over"), (400.0, "")):
            self.clock(monkeypatch, 1.0)
            model, structure = cut_model()
            rules = TrainingRules(seconds=limit, save_seconds=1e-9)
            report = train("full", model, structure, rules, snapshots=kept)
            assert report.ended == ended
            assert (len(report.losses) == 8) == (limit == 400.0)

    def test_too_little_for_what_must_go_is_told_halfway(self, monkeypatch):
        self.clock(monkeypatch, 1.0)
        model, structure = cut_model()
        with pytest.raises(TrialError, match=r"seconds: 10 s are too little .* steps took") as told:
            train("prunedlora", model, structure, TrainingRules(seconds=10.0, save_seconds=None))
        assert told.value.kind == "config"
        assert not any(p.requires_grad for p in model.parameters())

    def test_progress_is_told(self):
        told = []
        model, structure = cut_model()
        begun = time.monotonic()
        train("full", model, structure, tell=told.append)
        spent = time.monotonic() - begun
        assert [p.step for p in told] == list(range(1, 9))
        assert {p.steps for p in told} == {8}
        assert all(math.isfinite(p.loss) and p.seconds_left >= 0 for p in told)
        assert told[-1].seconds_left == 0
        assert told[-1].tokens_per_second >= 8 * BATCH * LENGTH / spent
