"""Text: corpora by spec, cut into disjoint parts, and token batches drawn from them by seed. The door to `datasets`.

A corpus spec is ``pydoc`` (the topics of Python's own help, shipped with CPython), ``stdlib`` (the docstrings of its
library), ``owner/name[:config[:split]]`` (a dataset repository, looked up under the local mirror first), an alias of
`ALIASES`, or a ``.txt``, ``.jsonl`` or ``.parquet`` file. Documents fall into the parts `PARTS` by the hash of their
text, so the parts never share a document.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml

from adasearch.config import CalibrationConfig
from adasearch.documents import fingerprint, value
from adasearch.errors import ConfigError, DataError
from adasearch.registry import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = {"fit": (0.0, 0.5), "search": (0.5, 0.8), "report": (0.8, 1.0)}
"""Share of the hash range of each part: fit (calibration, recovery), search (the objective), report (scored once)."""

# Published tables read the test split of WikiText-2 and the validation split of PTB (LLM-Pruner protocol).
ALIASES = {
    "wikitext": "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test",
    "ptb": "ptb-text-only/ptb_text_only:penn_treebank:validation",
}

_FILES = (".txt", ".jsonl", ".parquet")
_COLUMNS = ("text", "sentence", "page", "content")
_MAX_CHARACTERS = 100_000_000  # of one corpus; C4 would not fit on any disk here
_SHORT_ROW = 400  # characters; rows shorter than this on average are lines, not documents
_PASSAGE = 1_500  # characters at which a passage made of lines ends
_LONG_DOCUMENT = 12_000  # characters; longer documents are cut, else one of them would be most of a part
_BLOCK = 8_000
_CUTS = ((r"\n\s*\n", "\n\n"), (r"\n", "\n"), (r"(?<=[.!?]) ", " "))
_HEADING = re.compile(r"^ ?= [^=].*=\s*$")
_RULE = re.compile(r"^\s*[+|][-=+|\s]*$")  # of a table
_UNDERLINE = re.compile(r"^([*=\-~^\"])\1{2,}$")


@value
class Corpus:
    """Where text comes from; `name` is a repository ``owner/name``, a file, ``pydoc`` or ``stdlib``."""

    kind: Literal["embedded", "file", "dataset"]
    name: str
    config: str | None = None
    split: str | None = None
    folder: str | None = None

    @property
    def whole(self) -> bool:
        """Return whether perplexity reads all of it, as published figures do, and not its part ``report`` alone."""
        return self.split not in {None, "train"}


@value
class TokenStream:
    """Tokens for recovery (T-vector) and how often the corpus was gone through to fill it (fraction)."""

    tokens: Any
    epochs: float


def part_of(text: str) -> str:
    """Return the name of the part that a document belongs to.

    >>> part_of("a document") in PARTS
    True
    """
    position = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12
    return next(name for name, (low, high) in PARTS.items() if low <= position < high)


def _mirrored(data_root: str | None) -> list[str]:
    if data_root is None or not Path(data_root).is_dir():
        return []
    return sorted("/".join(path.parts[-2:]) for path in Path(data_root).glob("*/*") if path.is_dir())


def mirror_folder(repository: str, data_root: str | None) -> Path | None:
    """Return the folder that mirrors a dataset repository under `data_root`, None where there is none."""
    folder = Path(data_root, repository) if data_root is not None else None
    return folder if folder is not None and folder.is_dir() else None


def parse_corpus(spec: str, data_root: str | None = None, where: str = "corpus") -> Corpus:
    """Return what a corpus spec means; reads nothing but folder names.

    Raises:
        ConfigError: the spec names no file, alias or repository, or a repository that cannot be reached offline.
    """
    spec = ALIASES.get(spec, spec)
    if spec in EMBEDDED:
        return Corpus(kind="embedded", name=spec)
    if spec.endswith(_FILES):
        if not Path(spec).is_file():
            raise ConfigError(where, f"corpus file {spec!r} must exist")
        return Corpus(kind="file", name=spec)
    name, *rest = spec.split(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or len(rest) > 2:
        known = [*EMBEDDED, *ALIASES, *_mirrored(data_root)]
        shape = "pydoc, stdlib, owner/name[:config[:split]] or a .txt, .jsonl or .parquet file"
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
    place = Path(corpus.folder or corpus.name)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if corpus.folder else [place]
    states = [(str(path), path.stat()) for path in files] if corpus.kind == "file" or corpus.folder else []
    return fingerprint([(name, state.st_size, state.st_mtime_ns) for name, state in states])


def _mirror_splits(folder: Path) -> dict[str, list[str]]:
    """Return the splits of every config that the header of a mirror's README names, empty where it has none."""
    path = folder / "README.md"
    pieces = path.read_text(encoding="utf-8").split("---\n") if path.is_file() else []
    header = yaml.safe_load(pieces[1]) if len(pieces) > 2 else {}
    configs = header.get("configs", []) if isinstance(header, dict) else []
    return {c["config_name"]: [f["split"] for f in c["data_files"] if isinstance(f, dict)] for c in configs
            if isinstance(c.get("data_files"), list)}  # fmt: skip


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


def _row_text(row: Mapping[str, Any], name: str) -> str:
    if "instruction" in row and "output" in row:
        parts = (("Instruction", row["instruction"]), ("Input", row.get("input")), ("Response", row["output"]))
        return "\n\n".join(f"### {title}:\n{text}" for title, text in parts if text)
    for column in _COLUMNS:
        if isinstance(row.get(column), str):
            return str(row[column])
    known = ", ".join(("instruction + output", *_COLUMNS))
    raise DataError(f"corpus {name!r}: rows must have one of the columns {known}; they have {', '.join(row)}")


def _dataset_rows(corpus: Corpus) -> Iterator[Mapping[str, Any]]:
    import datasets  # here, not above: it costs a second that checking a study need not pay

    path, files = (corpus.folder or corpus.name), None
    if corpus.kind == "file":
        path, files = ("json" if corpus.name.endswith(".jsonl") else "parquet"), corpus.name
    # Streaming reads only what is taken; offline, the hub's cache holds whole datasets and cannot be streamed.
    streaming = bool(corpus.folder or files or not datasets.config.HF_HUB_OFFLINE)
    try:
        splits = datasets.load_dataset(path, corpus.config, data_files=files, streaming=streaming)
        split = corpus.split or next(s for s in ("train", "validation", *splits) if s in splits)
        if split not in splits:
            raise DataError(f"corpus {corpus.name!r} has no split {split!r}; {nearest(split, map(str, splits))}")
        yield from splits[split]
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise DataError(f"corpus {corpus.name!r} cannot be read from {path}: {problem}") from error


@functools.lru_cache(maxsize=16)
def _rows(corpus: Corpus) -> tuple[str, ...]:
    """Return the rows of a corpus as they are: paragraphs of a text file, records of anything else."""
    if corpus.name.endswith(".txt"):
        try:
            text = Path(corpus.name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"corpus {corpus.name!r} must be a readable UTF-8 text file: {error}") from error
        return tuple(re.split(r"\n\s*\n", text))
    rows, taken = [], 0
    for row in _dataset_rows(corpus):
        rows.append(_row_text(row, corpus.name))
        taken += len(rows[-1])
        if taken > _MAX_CHARACTERS:
            break
    return tuple(rows)


def _passages(rows: Iterable[str]) -> Iterator[str]:
    """Join lines into passages of about `_PASSAGE` characters, a page's heading always starting a new one."""
    lines: list[str] = []
    for row in rows:
        if lines and (_HEADING.match(row) or sum(map(len, lines)) >= _PASSAGE):
            yield "\n".join(lines)
            lines = []
        if row.strip():
            lines.append(row.strip())
    yield "\n".join(lines)


def _blocks(text: str, longest: int, size: int) -> Iterator[str]:
    """Cut a text longer than `longest` characters into blocks of `size` characters or a little more.

    The cuts are at blank lines; where they do not do, at line ends or at the ends of sentences.
    """
    if len(text) <= longest:
        yield text
        return
    fine = (cut for cut in _CUTS if max(map(len, re.split(cut[0], text))) <= longest)
    pattern, glue = next(fine, _CUTS[-1])
    block: list[str] = []
    for piece in re.split(pattern, text):
        block.append(piece)
        if sum(map(len, block)) >= size:
            yield glue.join(block)
            block = []
    yield glue.join(block)


def _sections(text: str) -> Iterator[str]:
    """Cut a help topic at its underlined headings.

    The underlines go: the same section stands under different ones in several topics, and must count once.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if _UNDERLINE.match(line) and lines and len(lines[-1]) == len(line):
            title = lines.pop()
            yield "\n".join(lines)
            lines = [title]
        elif not _RULE.match(line):
            lines.append(line)
    yield "\n".join(lines)


def _pydoc() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte of text

    for _, topic in sorted(topics.items()):
        for section in _sections(topic):
            yield from _blocks(section, _PASSAGE, 1_000)


def _stdlib() -> Iterator[str]:
    """Yield the docstrings of the standard library's modules, classes and functions; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):  # a file that this build leaves out or encodes otherwise
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _blocks(ast.get_docstring(node) or "", _PASSAGE, 1_000)


EMBEDDED: dict[str, Callable[[], Iterator[str]]] = {"pydoc": _pydoc, "stdlib": _stdlib}
"""Text that ships inside CPython: the language reference behind `help()`, and the docstrings of its library."""


@functools.lru_cache(maxsize=16)
def _documents(corpus: Corpus) -> tuple[str, ...]:
    if corpus.kind == "embedded":
        texts: Iterable[str] = (text for text in EMBEDDED[corpus.name]() if len(text) >= 200)
    else:
        rows = _rows(corpus)
        filled = [row for row in rows if row.strip()]
        lines = bool(filled) and sum(map(len, filled)) < _SHORT_ROW * len(filled)
        lines = lines and not filled[0].startswith("### Instruction:")
        whole = _passages(rows) if lines else filled
        texts = itertools.chain.from_iterable(_blocks(text, _LONG_DOCUMENT, _BLOCK) for text in whole)
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


def documents(corpus: str, part: str, data_root: str | None = None) -> tuple[str, ...]:
    """Return the documents of one part of a corpus, each once, in the order of the corpus.

    Args:
        corpus: a corpus spec.
        part: a name of `PARTS`.
        data_root: folder of mirrored dataset repositories.

    Raises:
        ConfigError: unknown corpus.
        DataError: the corpus cannot be read or the part is empty.
    """
    assert part in PARTS, f"{part!r} is none of {', '.join(PARTS)}"
    found = tuple(text for text in _documents(parse_corpus(corpus, data_root)) if part_of(text) == part)
    if not found:
        raise DataError(f"corpus {corpus!r}: its part {part!r} must hold a document; the corpus is too small")
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _windows(
    encode: Callable[[int], list[int]], documents: int, length: int, generator: np.random.Generator
) -> Iterator[list[int]]:
    """Yield windows of `length` tokens: one from each long document, the short ones laid end to end, pass after pass.

    What is drawn does not depend on how many windows are taken. It ends where a whole pass gives no window.
    """
    taken = -1
    while taken:
        taken, tail = 0, list[int]()
        for index in generator.permutation(documents).tolist():
            ids = encode(index)
            if len(ids) >= length:
                start = int(generator.integers(len(ids) - length + 1))
                yield ids[start : start + length]
                taken += 1
                continue
            tail += ids
            while len(tail) >= length:
                yield tail[:length]
                tail = tail[length:]
                taken += 1


def token_matrix(
    tokenizer: PreTrainedTokenizerBase, sample: CalibrationConfig, data_root: str | None = None, part: str = "fit"
) -> torch.Tensor:
    """Return a calibration sample, `N x T` token ids (int64): `sample.samples` windows of `sample.length` tokens.

    The draw seed chooses documents and offsets. A long document gives one window at a random offset in each pass over
    the corpus, short ones are joined by blank lines; a small corpus is gone through again, in another order. Samples
    are nested: the first n windows of a sample are the sample of n, all else being equal. Only documents that windows
    are taken from are tokenised.

    Raises:
        DataError: the part holds fewer than `sample.length` tokens.
    """
    texts = documents(sample.corpus, part, data_root)

    @functools.cache
    def encode(index: int) -> list[int]:
        return _ids(tokenizer, texts[index] + "\n\n")

    drawn = _windows(encode, len(texts), sample.length, np.random.default_rng(sample.draw))
    windows = list(itertools.islice(drawn, sample.samples))
    if not windows:
        total = sum(len(encode(index)) for index in range(len(texts)))
        raise DataError(f"corpus {sample.corpus!r}: part {part!r} holds {total} tokens, a window needs {sample.length}")
    return torch.tensor(windows, dtype=torch.long)


def token_stream(
    tokenizer: PreTrainedTokenizerBase,
    corpus: str,
    tokens: int,
    seed: int,
    data_root: str | None = None,
    part: str = "fit",
) -> TokenStream:
    """Return `tokens` token ids (int64): documents in an order drawn by `seed`, each ended by the eos token.

    A corpus that is too short is gone through again, in another order; `epochs` says how often.
    """
    texts = documents(corpus, part, data_root)
    generator = np.random.default_rng(seed)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    encoded: dict[int, list[int]] = {}
    stream: list[int] = []
    passes = 0.0
    while len(stream) < tokens:
        for index in generator.permutation(len(texts)).tolist():
            if index not in encoded:
                encoded[index] = _ids(tokenizer, texts[index]) + end
            stream += encoded[index]
            passes += 1 / len(texts)
            if len(stream) >= tokens:
                break
    return TokenStream(tokens=torch.tensor(stream[:tokens], dtype=torch.long), epochs=passes)


def first_tokens(tokenizer: Any, corpus: str, tokens: int, data_root: str | None, part: str = "fit") -> torch.Tensor:
    """Return the tokens of the first documents of a corpus, at most `tokens` and each document once (T, int64)."""
    found: list[int] = []
    for text in documents(corpus, part, data_root):
        found += _ids(tokenizer, text)
        if len(found) >= tokens:
            break
    return torch.tensor(found[:tokens], dtype=torch.long)


def perplexity_text(corpus: str, data_root: str | None = None) -> str:
    """Return one contiguous text to take the perplexity of.

    A corpus spec that names a split other than train is read whole, its rows joined by blank lines as published
    perplexities have it; any other gives its part ``report``.
    """
    source = parse_corpus(corpus, data_root)
    return "\n\n".join(_rows(source) if source.whole else documents(corpus, "report", data_root))


def perplexity_tokens(
    tokenizer: PreTrainedTokenizerBase, corpus: str, data_root: str | None = None, least: int = 2
) -> torch.Tensor:
    """Return the token ids (T-vector, int64) of `perplexity_text`.

    Args:
        tokenizer: of the model; special tokens are not added.
        corpus: a corpus spec.
        data_root: folder of mirrored dataset repositories.
        least: number of tokens that there must be, such as the longest window.

    Raises:
        DataError: there are fewer.
    """
    ids = _ids(tokenizer, perplexity_text(corpus, data_root))
    if len(ids) < least:
        raise DataError(f"corpus {corpus!r} holds {len(ids)} tokens for perplexity, {least} are needed")
    return torch.tensor(ids, dtype=torch.long)
