"""lm-eval on the very items that our trials score: its own task objects, its own evaluation, nothing between."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from adasearch.config import StudyConfig
from adasearch.tuning import tasks as task_door
from adasearch.tuning.items import Draw, Item, content_hash

Places = dict[str, list[int]]
Logliks = dict[str, list[np.ndarray]]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the remarks and progress bars of the libraries, which would hide the table; errors come through."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


class _TimedModel(HFLM):
    """lm-eval's Hugging Face model; knows how long it worked."""

    seconds = 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:  # noqa: FBT001, FBT002 - lm-eval's signature
        """Answer requests as the harness does."""
        start = time.perf_counter()
        found = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self.seconds += time.perf_counter() - start
        return found


def _cloze_task(spec: str, items: Sequence[Item]) -> ConfigurableTask:
    """Return a task object over our cloze items, whose choices begin with the delimiter already."""
    docs = [{"context": i.contexts[0], "options": list(i.choices), "label": i.gold} for i in items]
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    fields = {
        "task": spec.replace("/", "_"),
        "custom_dataset": lambda **_: datasets.DatasetDict(test=datasets.Dataset.from_list(docs)),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "options",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": metrics,
    }
    return ConfigurableTask(config=fields)


def load_tasks(study: StudyConfig) -> dict[str, Any]:
    """Return the lm-eval task object of every task that the study's objective searches on, by spec, its data read."""
    draw = Draw(seed=study.seed, search=study.objective.items, select=study.objective.select, data_root=study.data_root)
    found = {}
    with quietly():
        for spec in study.objective.search:
            cloze = spec.startswith("cloze/")
            found[spec] = (
                _cloze_task(spec, task_door.load_items(spec, "search", draw))
                if cloze
                else task_door.load_task(spec, study.data_root)
            )
    return found


def places(objects: Mapping[str, Any], items: Mapping[str, Sequence[Item]]) -> Places:
    """Return the document id of each of our items among the documents of its harness task, by task spec."""
    found = {}
    for spec, task in objects.items():
        if spec.startswith("cloze/"):
            found[spec] = list(range(len(items[spec])))
            continue
        # What an item is called by: the hash of its document after the task's own processing.
        hashes = (content_hash(json.dumps(doc, sort_keys=True, default=str)) for doc in task.eval_docs)
        ids = {name: index for index, name in enumerate(hashes)}
        found[spec] = [ids[item.id] for item in items[spec]]
    return found


def evaluate(
    model: Any, tokenizer: Any, objects: Mapping[str, Any], where: Places, batch_size: int
) -> tuple[Logliks, float]:
    """Return what `lm_eval.simple_evaluate` gives for each choice of the items, and its seconds in the model.

    Args:
        model: causal language model on its device.
        tokenizer: of the model.
        objects: task objects by spec.
        where: document ids of the items by task spec; the log-likelihoods come in this order.
        batch_size: sequences of a batch.
    """
    names = {spec: task.config.task for spec, task in objects.items()}
    with quietly():
        lm = _TimedModel(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        report = simple_evaluate(
            model=lm,
            tasks=list(objects.values()),
            samples={name: sorted(where[spec]) for spec, name in names.items()},
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
    logliks: Logliks = {}
    for spec, name in names.items():
        by_id = {entry["doc_id"]: entry["resps"] for entry in report["samples"][name]}
        logliks[spec] = [np.array([float(answer[0][0]) for answer in by_id[index]]) for index in where[spec]]
    return logliks, lm.seconds
