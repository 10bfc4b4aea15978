"""From a configuration to an outline and a whole trial: nothing takes more than the budget has, texts stay the same."""

import dataclasses
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adasearch import data, loading, outlining, trainings
from adasearch.config import TrialConfig, export_formats, study_from_dict
from adasearch.finalists import FinalTask
from adasearch.finalize import _perplexity, run_final
from adasearch.pruning.structure import WHOLE, Outline, count_outlined
from adasearch.trial import Clock, prune, run_trial
from adasearch.workbench import Workbench
from tests.test_cuts import assert_opened_the_same
from tests.tiny import SPECIAL, save_checkpoint

ROWS = 600
SAMPLE = {"corpus": "pydoc", "samples": 2, "length": 32}
LAYERS = 4


def trained_tokenizer():
    """Byte-level BPE with merges, trained on text that ships inside CPython."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=ROWS, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(data.documents("pydoc", "search")[:40], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary") / "tiny"
    tied = request.param
    save_checkpoint(folder, vocab_size=ROWS, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    trained_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    study = {
        "name": "s",
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "space": {"importance": {"choice": ["taylor"]}},
        "budget": {"remove": 0.3},
        "objective": {"search": ["cloze/pydoc"], "items": 4, "select": 4},
        "report": {
            "tasks": ["cloze/pydoc"],
            "items": 4,
            "perplexity": ["pydoc"],
            "perplexity_tokens": 512,
            "windows": [64],
        },
        "trial": {"calibration": SAMPLE},
    }
    return Workbench(study_from_dict(study, "study:", folder / "study.yaml"), folder / "run", threads=1)


def trial(**sections):
    return TrialConfig.from_dict({"calibration": SAMPLE, **sections}, "trial")


VOCABULARY = {"type": "by_use", "remove": 0.2}
HIDDEN = {"type": "activation_norm", "remove": 0.3}
DEPTH = {"type": "block_influence", "unit": "sublayer", "share": 0.5}


class TestDecide:
    def test_nothing_asked_nothing_goes(self, bench):
        assert outlining.decide(trial(), bench) == WHOLE

    def test_the_rows_used_least_go(self, bench):
        found = outlining.decide(trial(vocabulary=VOCABULARY), bench)
        assert found.tokens is not None
        assert ROWS - 0.2 * ROWS <= len(found.tokens) <= ROWS - 0.2 * ROWS + 8
        use = bench.token_use(("pydoc",), 1_000_000)
        gone = sorted(set(range(ROWS)) - set(found.tokens))
        kept_words = [i for i in found.tokens if i >= 256 + len(SPECIAL)]
        assert int(use[gone].max()) <= sorted(int(use[i]) for i in kept_words)[len(kept_words) // 2]

    def test_hidden_dimensions_are_a_multiple_of_the_heads(self, bench):
        found = outlining.decide(trial(hidden=HIDDEN), bench)
        assert found.hidden is not None
        assert len(found.hidden) == 18  # 30 % of 24 is 7.2: 6 go

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
    def test_nothing_takes_more_than_the_budget_has(self, bench, share, monkeypatch):
        config = trial(
            vocabulary={"type": "by_use", "remove": 0.5},
            hidden={"type": "magnitude", "remove": 0.9},
            depth={"type": "block_influence", "unit": "layer"},
        )
        budget = dataclasses.replace(bench.study.budget, remove=share)
        monkeypatch.setattr(bench, "study", dataclasses.replace(bench.study, budget=budget))
        found = outlining.decide(config, bench)
        left = count_outlined(bench.base.shape, bench.structure(), found)
        whole = bench.structure().parameters
        assert left >= whole - math.ceil(share * whole)

    def test_depth_takes_its_share(self, bench):
        found = outlining.decide(trial(depth=DEPTH), bench)
        assert found.gone
        left = count_outlined(bench.base.shape, bench.structure(), found)
        assert bench.structure().parameters - left <= 0.5 * math.ceil(0.3 * bench.structure().parameters)


CASES = {
    "vocabulary": {"vocabulary": VOCABULARY},
    "hidden": {"hidden": HIDDEN},
    "depth": {"depth": DEPTH},
    "sequential": {
        "depth": {**DEPTH, "share": 1.0},
        "units": {"attention": "none"},
        "schedule": "sequential",
        "compensation": "least_squares",
    },
    "all": {"vocabulary": VOCABULARY, "hidden": HIDDEN, "depth": DEPTH, "compensation": "least_squares"},
}


class TestTrial:
    @pytest.mark.parametrize("name", CASES)
    def test_meets_the_budget_and_scores_the_same_texts(self, bench, name):
        config = trial(**CASES[name])
        result, values = run_trial(config.to_dict(), bench)
        whole = bench.structure().parameters
        assert whole - result.parameters >= 0.3 * whole
        assert whole - result.parameters <= 0.3 * whole + 300
        assert math.isfinite(result.score)
        assert {len(found) for found in values.values()} == {4}
        assert set(result.widths) == {g.name for g in bench.structure(config.units).groups}

    @pytest.mark.parametrize("name", ["all"])
    def test_is_finished_exported_and_opens(self, bench, name):
        config = trial(**CASES[name])
        task = FinalTask(
            name=name,
            trial=0,
            role="finalist",
            config=config.to_dict(),
            recovery=config.recovery,
            formats=export_formats(["hf"], ""),
        )
        record = run_final(task, bench)
        assert record.export is not None
        folder = bench.run / record.export
        model = loading.load(folder)
        assert sum(p.numel() for p in model.parameters()) == record.parameters
        assert set(record.perplexity) == {"pydoc@64"}
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = "def f(x):\n    return x ** 2  # naïve café ☕\n"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
        config_file = json.loads((folder / "config.json").read_text())
        assert config_file["vocab_size"] == model.get_input_embeddings().num_embeddings
        assert len(tokenizer) <= config_file["vocab_size"]
        assert config_file["eos_token_id"] == tokenizer.eos_token_id

    @pytest.mark.parametrize("name", CASES)
    def test_does_the_same_again(self, bench, name):
        config = trial(**CASES[name])
        one, two = (prune(config, bench, Clock()) for _ in range(2))
        assert one.plan == two.plan
        for (key, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
            assert torch.equal(a, b), key


@pytest.mark.parametrize("recovery", [{"type": "lora", "distill": 0.5}, {"type": "distill", "hidden": 1.0}])
def test_a_smaller_vocabulary_is_taught_by_the_dense_model(bench, recovery):
    text = {"tokens": 128, "length": 32, "batch": 2}
    result, _ = run_trial(trial(vocabulary=VOCABULARY, recovery={**recovery, **text}).to_dict(), bench)
    assert result.notes["loss_last"] > 0


def test_where_tokens_go_the_teacher_is_the_dense_model_of_those_that_stay(bench):
    config = trial(recovery={"type": "distill", "tokens": 128, "length": 32, "batch": 2})
    outline = Outline(gone=("model.layers.0.mlp",), tokens=tuple(range(ROWS)))
    _, context = trainings.given("recovery", config, bench, outline, Clock())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        whole = bench.dense()(input_ids=ids).logits
        torch.testing.assert_close(context.teacher(input_ids=ids).logits, whole[..., :ROWS])


def test_perplexity_of_a_smaller_vocabulary_is_per_token_of_the_dense_one(bench):
    """The dense model with some rows gone, none of which the text uses: the same probabilities but for what is gone."""
    outline = Outline(tokens=tuple(range(ROWS)))
    same = _perplexity(bench.dense(outline), bench, outline)
    assert same == pytest.approx(_perplexity(bench.dense(), bench, WHOLE), rel=1e-5)


def test_a_cut_that_was_kept_is_the_same_model_once_opened(bench, tmp_path):
    sections = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "depth": DEPTH, "compensation": "bias"}
    assert_opened_the_same(trial(**sections), bench, tmp_path)
