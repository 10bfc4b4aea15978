"""Corpora by spec: what a spec means, and whether it can be, without reading any text.

A corpus spec is ``pydoc`` (the topics of Python's own help, shipped with CPython), ``stdlib`` (the docstrings of its
library), ``owner/name[:config[:split]]`` (a dataset repository, looked up under the local mirror first), an alias of
`ALIASES`, or a ``.txt``, ``.jsonl`` or ``.parquet`` file. ``chat/`` before a repository or file has its conversations
written in the model's chat template. ``self[:temperature=1.0][:length=256][:documents=256][:seed=0]`` is text that the
dense model makes, see `tuning.generation`; whoever holds that model puts a file in its place.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from pathlib import Path
from typing import Literal

import yaml

from adasearch.documents import fingerprint, parse, value
from adasearch.errors import ConfigError
from adasearch.passages import EMBEDDED
from adasearch.registry import nearest
from adasearch.sections import Sampling

# Published tables read the test split of WikiText-2 and the validation split of PTB (LLM-Pruner protocol).
ALIASES = {
    "wikitext": "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test",
    "ptb": "ptb-text-only/ptb_text_only:penn_treebank:validation",
}

_FILES = (".txt", ".jsonl", ".parquet")
CHAT = "chat/"
SELF = "self"


@value
class Corpus:
    """Where text comes from.

    Args:
        kind: ``generated`` is text of the dense model itself, which lies nowhere yet.
        name: a repository ``owner/name``, a file, ``pydoc``, ``stdlib``, or all of a spec of ``self``.
        config: of a repository.
        split: of a repository.
        folder: that mirrors a repository.
        chat: conversations are written in the model's chat template.
    """

    kind: Literal["embedded", "file", "dataset", "generated"]
    name: str
    config: str | None = None
    split: str | None = None
    folder: str | None = None
    chat: bool = False

    @property
    def whole(self) -> bool:
        """Return whether perplexity reads all of it, as published figures do, and not its part ``report`` alone."""
        return self.split not in {None, "train"}

    @property
    def plain(self) -> Corpus:
        """Return the same without a chat template."""
        return dataclasses.replace(self, chat=False)


def _mirrored(data_root: str | None) -> list[str]:
    if data_root is None or not Path(data_root).is_dir():
        return []
    return sorted("/".join(path.parts[-2:]) for path in Path(data_root).glob("*/*") if path.is_dir())


def mirror_folder(repository: str, data_root: str | None) -> Path | None:
    """Return the folder that mirrors a dataset repository under `data_root`, None where there is none."""
    folder = Path(data_root, repository) if data_root is not None else None
    return folder if folder is not None and folder.is_dir() else None


def sampling(spec: str, where: str = "corpus") -> Sampling | None:
    """Return how the dense model is to make the corpus ``self[:setting=number]..``, None for any other spec.

    Raises:
        ConfigError: an unknown setting, or one out of range.
    """
    name, *settings = spec.split(":")
    if name != SELF:
        return None
    pairs = [setting.partition("=") for setting in settings]
    return parse(Sampling, {key: number for key, _, number in pairs}, where)


def parse_corpus(spec: str, data_root: str | None = None, where: str = "corpus") -> Corpus:
    """Return what a corpus spec means; reads nothing but folder names.

    Raises:
        ConfigError: the spec names no file, alias or repository, or a repository that cannot be reached offline.
    """
    if spec.startswith(CHAT):
        inner = parse_corpus(spec.removeprefix(CHAT), data_root, where)
        if inner.kind not in {"file", "dataset"} or inner.name.endswith(".txt"):
            raise ConfigError(where, f"{CHAT} must stand before a repository or a file with rows, given {spec!r}")
        return dataclasses.replace(inner, chat=True)
    spec = ALIASES.get(spec, spec)
    if spec in EMBEDDED:
        return Corpus(kind="embedded", name=spec)
    if sampling(spec, where) is not None:
        return Corpus(kind="generated", name=spec)
    if spec.endswith(_FILES):
        if not Path(spec).is_file():
            raise ConfigError(where, f"corpus file {spec!r} must exist")
        return Corpus(kind="file", name=spec)
    name, *rest = spec.split(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or len(rest) > 2:
        known = [*EMBEDDED, SELF, *ALIASES, *_mirrored(data_root)]
        shape = "pydoc, stdlib, self, [chat/]owner/name[:config[:split]] or a .txt, .jsonl or .parquet file"
        raise ConfigError(where, f"unknown corpus {spec!r}, must be {shape}; {nearest(name, known)}")
    config, split = (*(item or None for item in rest), None, None)[:2]
    folder = mirror_folder(name, data_root)
    if folder is None and os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"} and data_root:
        raise ConfigError(where, f"{name!r} is not under {data_root} and HF_HUB_OFFLINE is set; "
                                 f"{nearest(name, _mirrored(data_root))}")  # fmt: skip
    return Corpus(kind="dataset", name=name, config=config, split=split, folder=str(folder) if folder else None)


@functools.lru_cache(maxsize=64)
def corpus_version(spec: str, data_root: str | None = None) -> str:
    """Return what changes when the text of a corpus does, as far as that can be seen without reading it.

    That is size and time of change of the files of a corpus on this machine, and the version of Python for the text
    that it ships. Looked up once by each process; a repository elsewhere counts as unchanging.
    """
    corpus = parse_corpus(spec, data_root)
    if corpus.kind == "embedded":
        return sys.version
    if corpus.kind == "generated":
        return SELF  # it follows from the model and the spec
    place = Path(corpus.folder or corpus.name)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if corpus.folder else [place]
    states = [(str(path), path.stat()) for path in files] if corpus.kind == "file" or corpus.folder else []
    return fingerprint([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def _mirror_splits(folder: Path) -> dict[str, list[str]]:
    """Return the splits of every config that the header of a mirror's README names, empty where it has none."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    pieces = text.split("---\n") if text.startswith("---\n") else []
    try:
        header = yaml.safe_load(pieces[1]) if len(pieces) > 2 else {}
    except yaml.YAMLError:
        return {}  # what cannot be read says nothing; `datasets` has the last word
    configs = header.get("configs", []) if isinstance(header, dict) else []
    return {
        c.get("config_name", "default"): [f.get("split", "train") for f in c["data_files"] if isinstance(f, dict)]
        for c in configs
        if isinstance(c.get("data_files"), list)
    }


def check_corpus(spec: str, data_root: str | None = None, where: str = "corpus") -> None:
    """Check a corpus spec without reading or downloading any text.

    Raises:
        ConfigError: unknown corpus, or a config or split that the mirror does not have.
    """
    corpus = parse_corpus(spec, data_root, where)
    configs = _mirror_splits(Path(corpus.folder)) if corpus.folder else {}
    if not configs:
        return
    if corpus.config is None and len(configs) > 1 and "default" not in configs:
        raise ConfigError(where, f"corpus {spec!r} must name one of the configs {', '.join(sorted(configs))}")
    config = corpus.config or ("default" if "default" in configs else next(iter(configs)))
    if config not in configs:
        raise ConfigError(where, f"corpus {corpus.name!r} has no config {config!r}; {nearest(config, configs)}")
    if corpus.split is not None and corpus.split not in configs[config]:
        raise ConfigError(where, f"corpus {corpus.name}:{config} has no split {corpus.split!r}; "
                                 f"{nearest(corpus.split, configs[config])}")  # fmt: skip


def scored_corpus(spec: str, data_root: str | None = None, where: str = "corpus") -> None:
    """Check a corpus spec whose text is to be scored: as `check_corpus`, and it must be somebody's text as it stands.

    Raises:
        ConfigError: it is not, or the check fails.
    """
    check_corpus(spec, data_root, where)
    source = parse_corpus(spec, data_root, where)
    if source.chat or source.kind == "generated":
        problem = f"must be text as it was written, given {spec!r}: self and chat/ are for calibration and recovery"
        raise ConfigError(where, problem)
