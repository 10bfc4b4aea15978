"""Whether text that a model is calibrated or tuned on holds items that it is scored on.

The rule follows the overlap of 13 words of Brown et al. (GPT-3, 2020, appendix C), which lm-eval's decontamination
uses too. Texts are compared as words: runs of letters and digits in lower case, without the labels ``Question:`` and
``Answer:`` that prompts put at the beginning of lines. An item is its context followed by its right choice. It stands
in a document if

- any 13 words in a row of the item stand there in a row, or
- the whole item does, for one of 5 to 12 words, or
- its whole context does, for one of 8 to 12 words: instruction data has the same question with an answer of its own.

Items of fewer than 5 words are not looked for: such runs are in any text. Wrong choices are no part of an item.

Runs are looked up by a hash, all of a document at once, and a hit is compared word for word.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from adasearch.errors import ConfigError
from adasearch.tuning.items import Item

WORDS = 13
"""Words in a row that two texts share only if one comes from the other."""
_LEAST_ITEM, _LEAST_CONTEXT = 5, 8
_WORD = re.compile(r"[^\W_]+")
_LABEL = re.compile(r"^\s*(?:question|answer|q|a)\s*:", re.IGNORECASE | re.MULTILINE)
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run is lost modulo 2^64


def words(text: str) -> list[str]:
    """Return what two texts are compared by.

    >>> words("Question: What's 2 + 2?")
    ['what', 's', '2', '2']
    """
    return _WORD.findall(_LABEL.sub(" ", text).lower())


def _runs(item: Item) -> Iterator[list[str]]:
    """Yield the runs of words by which an item is known."""
    context, choice = item.pairs()[item.gold]
    asked, whole = words(context), words(f"{context} {choice}")
    if len(whole) >= WORDS:
        yield from (whole[begin : begin + WORDS] for begin in range(len(whole) - WORDS + 1))
    elif len(whole) >= _LEAST_ITEM:
        yield whole
    if _LEAST_CONTEXT <= len(asked) < WORDS:
        yield asked


def _hashes(text: Sequence[str]) -> np.ndarray:
    return np.fromiter((zlib.crc32(word.encode()) for word in text), dtype=np.uint64, count=len(text))


def _rolled(hashes: np.ndarray, length: int) -> np.ndarray:
    """Return a number for each run of `length` words in a row (uint64, modulo 2^64)."""
    count = max(0, len(hashes) - length + 1)
    result = np.zeros(count, dtype=np.uint64)
    for shift in range(length):
        result *= _BASE
        result += hashes[shift : shift + count]
    return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Index:
    """The runs of words of many items, by their length: sorted hashes, and the item that each belongs to."""

    names: tuple[str, ...]
    texts: tuple[str, ...]
    tables: dict[int, tuple[np.ndarray, np.ndarray]]

    @staticmethod
    def of(items: Iterable[Item]) -> Index:
        """Return the index of items."""
        names, texts = list[str](), list[str]()
        runs: dict[int, dict[int, int]] = {}
        for item in items:
            context, choice = item.pairs()[item.gold]
            texts.append(f" {' '.join(words(f'{context} {choice}'))} ")
            names.append(f"{item.task} {item.id}")
            for run in _runs(item):
                (number,) = _rolled(_hashes(run), len(run)).tolist()
                runs.setdefault(len(run), {}).setdefault(number, len(names) - 1)
        tables = {}
        for length, owners in sorted(runs.items()):
            keys = np.array(sorted(owners), dtype=np.uint64)
            tables[length] = keys, np.array([owners[int(key)] for key in keys], dtype=np.int32)
        return Index(names=tuple(names), texts=tuple(texts), tables=tables)

    def find(self, text: str) -> str | None:
        """Return the name of an item that stands in a text, None where there is none."""
        found = words(text)
        hashes = _hashes(found)
        for length, (keys, owners) in self.tables.items():
            runs = _rolled(hashes, length)
            places = np.minimum(np.searchsorted(keys, runs), len(keys) - 1)
            for begin in np.flatnonzero(keys[places] == runs).tolist():
                owner = int(owners[places[begin]])
                if f" {' '.join(found[begin : begin + length])} " in self.texts[owner]:
                    return self.names[owner]
        return None


@dataclass(slots=True, eq=False)
class Watch:
    """Looks at each document of one text before it is read; a `data.Guard` that counts.

    Args:
        index: of the items that must not stand in it.
        refuse: raise where one does, in place of leaving the document out.
        dropped: documents left out so far.
    """

    index: Index
    refuse: bool = False
    dropped: int = field(default=0, init=False)

    def __call__(self, text: str) -> bool:
        """Return whether a document must be left out.

        Raises:
            ConfigError: it must, and that is refused.
        """
        found = self.index.find(text)
        if found is not None and self.refuse:
            start = " ".join(text.split())[:80]
            problem = f"the item {found} stands in text that is to be read, {start!r}: take another corpus, or drop"
            raise ConfigError("report.contamination", problem)
        self.dropped += found is not None
        return found is not None
