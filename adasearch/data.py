"""Text of corpora, in disjoint parts, and the tokens of calibration samples and perplexity. The door to `datasets`.

Documents fall into the parts `PARTS` by the hash of their text, so the parts never share a document; a conversation
falls where its plain text does. What corpora there are says `corpora`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adasearch import chat
from adasearch.chat import Conversation, Written, conversation
from adasearch.corpora import CHAT, Corpus, parse_corpus
from adasearch.documents import value
from adasearch.errors import DataError
from adasearch.passages import EMBEDDED, blocks, passages
from adasearch.registry import nearest
from adasearch.sections import CalibrationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = {"fit": (0.0, 0.5), "search": (0.5, 0.8), "report": (0.8, 1.0)}
"""Share of the hash range of each part: fit (calibration, recovery), search (the objective), report (scored once)."""

_COLUMNS = ("text", "sentence", "page", "content", "document")
_MAX_CHARACTERS = 100_000_000  # of one corpus; C4 would not fit on any disk here
_SHORT_ROW = 400  # characters; rows shorter than this on average are lines, not documents

Guard = Callable[[str], bool]
"""Whether a document must be left out; it may count, or raise instead."""


def part_of(text: str) -> str:
    """Return the name of the part that a document belongs to.

    >>> part_of("a document") in PARTS
    True
    """
    position = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) / 16**12
    return next(name for name, (low, high) in PARTS.items() if low <= position < high)


def held_out(text: str, share: float) -> bool:
    """Return whether a document is one of the `share` of all that is kept apart to measure a training on.

    It follows from the text alone, and from other digits of its digest than `part_of`.
    """
    return int(hashlib.sha256(text.encode()).hexdigest()[12:24], 16) / 16**12 < share


def _row_text(row: Mapping[str, Any], name: str) -> str:
    for column in _COLUMNS:
        if isinstance(row.get(column), str):
            return str(row[column])
    if any(row.get(column, ...) is None for column in _COLUMNS):
        return ""
    known = ", ".join((chat.FORMS, *_COLUMNS))
    raise DataError(f"corpus {name!r}: rows must have one of the columns {known}; they have {', '.join(row)}")


def _loaded(load: Callable[..., Any], path: str, *given: Any, **options: Any) -> Any:
    """Return what `datasets` loads; an empty file makes it run off the end of its own reader."""
    try:
        return load(path, *given, **options)
    except StopIteration as error:
        raise ValueError("it holds no rows") from error


def _dataset_rows(corpus: Corpus) -> Iterator[Mapping[str, Any]]:
    import datasets  # here, not above: it costs a second that checking a study need not pay
    from datasets.exceptions import DatasetsError

    path, files = (corpus.folder or corpus.name), None
    if corpus.kind == "file":
        path, files = ("json" if corpus.name.endswith(".jsonl") else "parquet"), corpus.name
    # Streaming reads only what is taken; offline, the hub's cache holds whole datasets and cannot be streamed.
    streaming = bool(corpus.folder or files or not datasets.config.HF_HUB_OFFLINE)
    try:
        splits = _loaded(datasets.load_dataset, path, corpus.config, data_files=files, streaming=streaming)
        split = corpus.split or next(s for s in ("train", "validation", *splits) if s in splits)
        if split not in splits:
            raise DataError(f"corpus {corpus.name!r} has no split {split!r}; {nearest(split, map(str, splits))}")
        yield from splits[split]
    except (OSError, ValueError, DatasetsError) as error:
        problem = " ".join(str(error).split())[:300]
        raise DataError(f"corpus {corpus.name!r} cannot be read from {path}: {problem}") from error


@value
class _Rows:
    """The rows of a corpus as they are; `apart` where each is a document of its own, however short."""

    texts: tuple[str, ...]
    apart: bool = False


def _taken(corpus: Corpus) -> Iterator[tuple[Mapping[str, Any], Conversation | None, str]]:
    """Yield rows of a data set, as conversation and as text, until they hold as much as any corpus may."""
    taken = 0
    for row in _dataset_rows(corpus):
        talk = conversation(row, corpus.name)
        text = talk.text if talk is not None else _row_text(row, corpus.name)
        yield row, talk, text
        taken += len(text)
        if taken > _MAX_CHARACTERS:
            break


@functools.lru_cache(maxsize=16)
def _rows(corpus: Corpus) -> _Rows:
    """Return the rows of a corpus as they are: paragraphs of a text file, records of anything else."""
    if corpus.name.endswith(".txt"):
        try:
            text = Path(corpus.name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"corpus {corpus.name!r} must be a readable UTF-8 text file: {error}") from error
        return _Rows(texts=tuple(re.split(r"\n\s*\n", text)))
    rows = [(text, talk is not None or "document" in row) for row, talk, text in _taken(corpus)]
    return _Rows(texts=tuple(text for text, _ in rows), apart=any(apart for _, apart in rows))


@functools.lru_cache(maxsize=16)
def _documents(corpus: Corpus) -> tuple[str, ...]:
    if corpus.kind == "embedded":
        texts: Iterable[str] = (text for text in EMBEDDED[corpus.name]() if len(text) >= 200)
    else:
        rows = _rows(corpus)
        filled = [row for row in rows.texts if row.strip()]
        lines = not rows.apart and bool(filled) and sum(map(len, filled)) < _SHORT_ROW * len(filled)
        texts = itertools.chain.from_iterable(map(blocks, passages(rows.texts) if lines else filled))
    return tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))


@functools.lru_cache(maxsize=16)
def _conversations(corpus: Corpus) -> tuple[Conversation, ...]:
    """Return the conversations of a corpus, each once."""
    found: dict[str, Conversation] = {}
    for row, talk, text in _taken(corpus):
        if talk is None:
            known = ", ".join(row)
            raise DataError(f"corpus {CHAT}{corpus.name}: rows must be conversations ({chat.FORMS}); they have {known}")
        if talk.turns and text.strip():
            found.setdefault(text.strip(), talk)
    return tuple(found.values())


def _talks(corpus: Corpus, part: str) -> tuple[Conversation, ...]:
    """Return the conversations whose plain text lies in one part; one so long that it is cut, where all of it does."""
    return tuple(
        talk
        for talk in _conversations(corpus)
        if {part_of(block.strip()) for block in blocks(talk.text) if block.strip()} == {part}
    )


def documents(corpus: str, part: str, data_root: str | None = None) -> tuple[str, ...]:
    """Return the documents of one part of a corpus, each once, in the order of the corpus.

    Args:
        corpus: a corpus spec; of conversations this gives the plain text.
        part: a name of `PARTS`.
        data_root: folder of mirrored dataset repositories.

    Raises:
        ConfigError: unknown corpus.
        DataError: the corpus cannot be read or the part is empty.
    """
    assert part in PARTS, f"{part!r} is none of {', '.join(PARTS)}"
    source = parse_corpus(corpus, data_root)
    assert source.kind != "generated", f"{corpus!r} must be made first"
    if source.chat:
        found = tuple(talk.text.strip() for talk in _talks(source, part))
    else:
        found = tuple(text for text in _documents(source) if part_of(text) == part)
    if not found:
        raise DataError(f"corpus {corpus!r}: its part {part!r} must hold a document; the corpus is too small")
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Texts:
    """The documents of one part of a corpus as a tokenizer writes them, each when it is first asked for.

    Args:
        tokenizer: of the model.
        corpus: a corpus spec.
        part: a name of `PARTS`.
        data_root: folder of mirrored dataset repositories.
        guard: asked of the plain text of each document before it is written; what it takes is empty.
        glue: put after plain text.

    Raises:
        ConfigError: unknown corpus.
        DataError: the corpus cannot be read, or asks for a chat template where the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        corpus: str,
        part: str,
        data_root: str | None = None,
        *,
        guard: Guard | None = None,
        glue: str = "",
    ) -> None:
        self.corpus, self.part = corpus, part
        self._texts = documents(corpus, part, data_root)
        source = parse_corpus(corpus, data_root)
        self._talks = _talks(source, part) if source.chat else ()
        self._tokenizer, self._guard, self._glue = tokenizer, guard, glue
        self._known: dict[int, Written] = {}
        if source.chat:
            chat.check_template(tokenizer, corpus)

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def tokens(self) -> int:
        """Return how many tokens the documents hold that were asked for."""
        return sum(len(found.ids) for found in self._known.values())

    def __getitem__(self, index: int) -> Written:
        if index not in self._known:
            self._known[index] = self._written(index)
        return self._known[index]

    def _written(self, index: int) -> Written:
        if self._guard is not None and self._guard(self._texts[index]):
            return Written([])
        if self._talks:
            return chat.write(self._tokenizer, self._talks[index].turns, self.corpus)
        return Written(_ids(self._tokenizer, self._texts[index] + self._glue))


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
    tokenizer: PreTrainedTokenizerBase,
    sample: CalibrationConfig,
    data_root: str | None = None,
    part: str = "fit",
    guard: Guard | None = None,
) -> torch.Tensor:
    """Return a calibration sample, `N x T` token ids (int64): `sample.samples` windows of `sample.length` tokens.

    The draw seed chooses documents and offsets. A long document gives one window at a random offset in each pass over
    the corpus, short ones are joined by blank lines; a small corpus is gone through again, in another order. Samples
    are nested: the first n windows of a sample are the sample of n, all else being equal. Only documents that windows
    are taken from are tokenised, and shown to `guard`, which may take them out.

    Raises:
        DataError: the part holds fewer than `sample.length` tokens.
    """
    texts = Texts(tokenizer, sample.corpus, part, data_root, guard=guard, glue="\n\n")
    generator = np.random.default_rng(sample.draw)
    drawn = _windows(lambda index: texts[index].ids, len(texts), sample.length, generator)
    windows = list(itertools.islice(drawn, sample.samples))
    if not windows:
        given = f"part {part!r} holds {texts.tokens} tokens that may be read, a window needs {sample.length}"
        raise DataError(f"corpus {sample.corpus!r}: {given}")
    return torch.tensor(windows, dtype=torch.long)


def first_tokens(
    tokenizer: Any, corpus: str, tokens: int, data_root: str | None, part: str = "fit", guard: Guard | None = None
) -> torch.Tensor:
    """Return the tokens of the first documents of a corpus, at most `tokens` and each document once (T, int64)."""
    texts, found = Texts(tokenizer, corpus, part, data_root, guard=guard), list[int]()
    for index in range(len(texts)):
        found += texts[index].ids
        if len(found) >= tokens:
            break
    return torch.tensor(found[:tokens], dtype=torch.long)


def perplexity_text(corpus: str, data_root: str | None = None) -> str:
    """Return one contiguous text to take the perplexity of.

    A corpus spec that names a split other than train is read whole, its rows joined by blank lines as published
    perplexities have it; any other gives its part ``report``.
    """
    source = parse_corpus(corpus, data_root)
    return "\n\n".join(_rows(source).texts if source.whole else documents(corpus, "report", data_root))


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
