"""Task items by spec, role and seed. The door to lm-eval: its tasks as it defines them, without its slow index.

A task spec is ``cloze/<corpus>``, or the name of one of lm-eval's multiple-choice tasks with an optional dataset split,
such as ``piqa:train``; without one the split is the one that lm-eval reports on.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from adasearch.config import StudyConfig
from adasearch.corpora import check_corpus, mirror_folder, parse_corpus, scored_corpus
from adasearch.documents import value
from adasearch.errors import ConfigError, DataError
from adasearch.tuning.cloze import cloze_items
from adasearch.tuning.items import Draw, Item, Role, content_hash, shuffled

_TASK_LINE = re.compile(rb"^[\"']?task[\"']?:[ \t]*[\"']?([^\s\"'#\[\]]+)", re.MULTILINE)
_GROUP = "adasearch"


@value
class TaskFacts:
    """What the file of an lm-eval task says, and the dataset split that a spec of it means."""

    name: str
    file: str
    dataset: tuple[str, str | None]
    split: str

    @property
    def source(self) -> tuple[str, str | None, str]:
        """Return repository, config and split: two tasks of equal source read the same questions."""
        return (*self.dataset, self.split)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads a task's file without importing the functions that it names."""


_Loader.add_constructor("!function", lambda _, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    """Return the fields of a task's file over those of the files that it includes."""
    own: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged.update(_read(path.parent / name))
    return merged | own


@functools.cache
def task_files() -> Mapping[str, Path]:
    """Return the file of every lm-eval task by name; takes half a second once, lm-eval's own index twelve each time.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    package = importlib.util.find_spec("lm_eval")
    if package is None or package.origin is None:
        raise ConfigError("", "lm-eval tasks need the package lm-eval: pip install lm-eval")
    names: dict[str, Path] = {}
    for path in sorted(Path(package.origin).parent.joinpath("tasks").rglob("*.yaml")):
        match = _TASK_LINE.search(path.read_bytes())
        if match is not None:
            names.setdefault(match[1].decode(), path)
    return names


def _refuse(facts: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse tasks that are scored in another way than by the log-likelihoods of their choices."""
    metrics = {str(m.get("metric")) for m in facts.get("metric_list") or [{"metric": "acc"}]}
    problem = None
    if facts.get("output_type") != "multiple_choice":
        problem = f"its output_type is {facts.get('output_type')}"
    elif "acc" not in metrics:
        problem = f"it reports {', '.join(sorted(metrics))} and not acc"
    elif "process_results" in facts or "class" in facts:
        problem = "it scores its answers with code of its own"
    elif facts.get("num_fewshot"):
        problem = f"it shows {facts['num_fewshot']} examples first"
    if problem is not None:
        raise ConfigError(where, f"task {name!r} must be a zero-shot multiple-choice task; {problem}")


@functools.cache
def task_facts(spec: str, where: str = "task") -> TaskFacts:
    """Return what an lm-eval task spec means; reads one small file and no data.

    Raises:
        ConfigError: unknown task (with the nearest names), or one that is not scored by choices.
    """
    name, _, split = spec.partition(":")
    files = task_files()
    if name not in files:
        close = difflib.get_close_matches(name, files, n=5, cutoff=0.6)
        near = f"nearest: {', '.join(close)}" if close else "lm-eval has no name near it; cloze/<corpus> needs none"
        raise ConfigError(where, f"unknown task {name!r}; {near}")
    fields = _read(files[name])
    _refuse(fields, name, where)
    dataset = str(fields.get("dataset_path")), fields.get("dataset_name")
    stock = str(fields.get("test_split") or fields.get("validation_split"))
    return TaskFacts(name=name, file=str(files[name]), dataset=dataset, split=split or stock)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence lm-eval's remarks on its own task files and the progress bars of `datasets`."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _mirrored(folder: Path, config: str | None) -> Any:
    """Return the splits of a mirrored repository, read from its files each time.

    The cache of `datasets` would not do: it tells two mirrors apart by folder name and header, not by their data.
    """
    import datasets

    streams = datasets.load_dataset(str(folder), config, streaming=True)
    splits = {name: datasets.Dataset.from_list(list(rows), features=rows.features) for name, rows in streams.items()}
    return datasets.DatasetDict(splits)


def load_task(spec: str, data_root: str | None = None) -> Any:
    """Return the lm-eval task object of a spec, its data loaded: what `lm_eval.evaluate` takes.

    Args:
        spec: name, with an optional split that takes the place of the task's own.
        data_root: folder of mirrored dataset repositories; one that is not there is asked of the hub.

    Raises:
        ConfigError: unknown or unsupported task.
        DataError: its data cannot be read.
    """
    from lm_eval.tasks import TaskManager  # two seconds that `validate` need not pay

    facts = task_facts(spec)
    folder = mirror_folder(facts.dataset[0], data_root)
    own: dict[str, Any] = {"task": facts.name, "test_split": facts.split}
    if folder is not None:
        own["custom_dataset"] = lambda **_: _mirrored(folder, facts.dataset[1])
    with _quietly():
        manager = TaskManager(include_defaults=False, include_path=str(Path(facts.file).parent))
        try:
            loaded = manager.load([{"group": _GROUP, "task": [own]}])
        except (OSError, ValueError, KeyError) as error:
            problem = " ".join(str(error).split())[:300]
            place = folder or f"the hub ({facts.dataset[0]})"
            message = f"task {spec!r}: its split {facts.split!r} cannot be read from {place}: {problem}"
            raise DataError(message) from error
    return loaded["tasks"][facts.name]


def build_item(spec: str, task: Any, doc: Mapping[str, Any], name: str) -> Item:
    """Return the item that an lm-eval task object makes of a document: the requests that lm-eval would send.

    Args:
        spec: what the item's `task` shall be.
        task: an lm-eval task object.
        doc: a document after the task's own `process_docs`.
        name: what the item's `id` shall be.

    Raises:
        DataError: the document has no single right choice.
    """
    context = task.fewshot_context(doc, num_fewshot=0, gen_prefix=task.doc_to_prefix(doc))
    requests = task.construct_requests(doc, context, metadata=(spec, 0, 1))
    texts = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = texts.index(gold) if gold in texts else None
    if not isinstance(gold, int) or not 0 <= gold < len(texts):
        raise DataError(f"task {spec!r}: document {name} must have one right choice of {len(texts)}, it has {gold!r}")
    pairs = [request.args for request in requests[: len(texts)]]  # more of them belong to metrics that we do not use
    contexts = tuple(pair[0] for pair in pairs)
    return Item(
        task=spec,
        id=name,
        contexts=contexts if len(set(contexts)) > 1 else contexts[:1],
        choices=tuple(pair[1] for pair in pairs),
        gold=gold,
        lengths=tuple(map(len, texts)),
        acc_norm="acc_norm" in task.aggregation(),
    )


def _harness_items(spec: str, role: Role, draw: Draw) -> tuple[Item, ...]:
    task = load_task(spec, draw.data_root)
    with _quietly():
        docs = {content_hash(json.dumps(doc, sort_keys=True, default=str)): doc for doc in task.eval_docs}
        order = shuffled(docs, draw.seed)
        first = {"search": 0, "select": draw.search, "report": draw.search + draw.select if draw.shared else 0}[role]
        wanted = {"search": draw.search, "select": draw.select, "report": draw.report or len(order)}[role]
        chosen = order[first : first + wanted]
        if not chosen or (len(chosen) < wanted and role != "report"):
            raise DataError(f"task {spec!r} must give {first + wanted} items for search and select, its split has "
                            f"{len(order)}")  # fmt: skip
        return tuple(build_item(spec, task, docs[name], name) for name in chosen)


def load_items(spec: str, role: Role, draw: Draw) -> tuple[Item, ...]:
    """Return the items of a task for one role; equal arguments give equal items on every machine.

    Documents that are equal word for word count once. Fewer report items than asked for are no error.

    Raises:
        ConfigError: unknown task or corpus.
        DataError: the data cannot be read or hold too few items; the message says how many they hold.
    """
    return (cloze_items if spec.startswith("cloze/") else _harness_items)(spec, role, draw)


def _source(spec: str, data_root: str | None, where: str) -> tuple[str | None, ...]:
    """Return what two specs have in common when they read the same questions."""
    if not spec.startswith("cloze/"):
        return task_facts(spec, where).source
    corpus = parse_corpus(spec.removeprefix("cloze/"), data_root, where)
    return ("cloze", corpus.name, corpus.config, corpus.split)


def study_items(study: StudyConfig, role: Role) -> dict[str, tuple[Item, ...]]:
    """Return the items of all tasks of a study for one role, by task spec.

    Raises:
        ConfigError: unknown task or corpus.
        DataError: a task's data cannot be read or hold too few items.
    """
    objective, root = study.objective, study.data_root
    searched = {_source(spec, root, "objective.search") for spec in objective.search}
    result = {}
    for spec in study.report.tasks if role == "report" else objective.search:
        draw = Draw(
            seed=study.seed,
            search=objective.items,
            select=objective.select,
            report=study.report.items,
            shared=role == "report" and _source(spec, root, "report.tasks") in searched,
            data_root=root,
        )
        result[spec] = load_items(spec, role, draw)
    return result


def check_tasks(study: StudyConfig) -> None:
    """Check the tasks and corpora of a study's objective and report without loading data or weights.

    Raises:
        ConfigError: an unknown or unsupported task, one that stands twice, an unknown corpus, or a split that both
            search and report read without `objective.allow_shared_splits`.
    """
    sources: dict[str, dict[tuple[str | None, ...], str]] = {}
    root = study.data_root
    for where, specs in (("objective.search", study.objective.search), ("report.tasks", study.report.tasks)):
        sources[where] = {}
        for spec in specs:
            source = _source(spec, root, where)
            if spec.startswith("cloze/"):
                scored_corpus(spec.removeprefix("cloze/"), root, where)
            elif mirror_folder(str(source[0]), root) is not None:
                check_corpus(f"{source[0]}:{source[1] or ''}:{source[2]}", root, where)
            if source in sources[where]:
                raise ConfigError(where, f"{spec!r} reads the same questions as {sources[where][source]!r}")
            sources[where][source] = spec
    for corpus in study.report.perplexity:
        scored_corpus(corpus, root, "report.perplexity")
    _check_disjoint(study, sources["objective.search"], sources["report.tasks"])


def _check_disjoint(study: StudyConfig, search: Mapping[Any, str], report: Mapping[Any, str]) -> None:
    if study.objective.allow_shared_splits:
        return
    advice = "report another split, or set objective.allow_shared_splits"
    for source, spec in report.items():
        # Cloze items of the two roles come from disjoint parts of their corpus.
        if source in search and source[0] != "cloze":
            data = " ".join(map(str, source))
            problem = f"{spec!r} reads the split that objective.search reads by {search[source]!r} ({data}); {advice}"
            raise ConfigError("report.tasks", problem)
    for corpus in study.report.perplexity:
        parsed = parse_corpus(corpus, study.data_root, "report.perplexity")
        if parsed.whole and ("cloze", parsed.name, parsed.config, parsed.split) in search:
            problem = f"{corpus!r} is read whole and objective.search reads it too; {advice}"
            raise ConfigError("report.perplexity", problem)
