"""Cloze tasks from any corpus: which of four continuations follows this passage? Needs no data set but plain text.

The three wrong continuations are runs of as many words from elsewhere in the same document where it is long enough,
else from another document of the pool. Search and select items come from disjoint documents of the corpus part
``search``, report items from the part ``report``; calibration and recovery read neither.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from adasearch.data import documents
from adasearch.documents import value
from adasearch.errors import DataError
from adasearch.tuning.items import Draw, Item, Role, content_hash

CHOICES = 4
CONTEXT_WORDS = (40, 64)  # about 50 to 90 tokens of English
CHOICE_WORDS = (12, 20)
# Two right continuations of one document never overlap: the later context starts this many words after the earlier
# one at least, plus the length of its continuation.
_STRIDE = CONTEXT_WORDS[1] - CONTEXT_WORDS[0]
_POOL = 2_000  # documents; a larger corpus is sampled
_ALL = 1_000  # report items when the study does not say how many


@value
class _Place:
    """A passage of a document: the words from `start` on, `context` of them and then the right `choice` ones."""

    document: int
    start: int
    context: int
    choice: int

    @property
    def end(self) -> int:
        return self.start + self.context + self.choice


def _random(seed: int, *parts: object) -> random.Random:
    return random.Random(hashlib.sha256(repr((seed, *parts)).encode()).digest())


def _pool(spec: str, role: Role, draw: Draw) -> list[list[str]]:
    """Return the documents of a role as lists of words; search and select share theirs by number of items."""
    corpus = spec.removeprefix("cloze/")
    texts = documents(corpus, "report" if role == "report" else "search", draw.data_root)
    chosen = sorted(texts, key=lambda text: content_hash(str(draw.seed), text))[:_POOL]
    pool = [text.split() for text in chosen]
    if role == "report":
        return pool
    total, before = sum(map(len, pool)), 0
    shares: dict[str, list[list[str]]] = {"search": [], "select": []}
    for words in pool:
        first = before * (draw.search + draw.select) < total * draw.search
        shares["search" if first else "select"].append(words)
        before += len(words)
    return shares[role]


def _places(pool: Sequence[list[str]], seed: int) -> list[_Place]:
    """Return every passage that can become an item, in an order drawn by `seed`."""
    found: list[tuple[float, _Place]] = []
    for index, words in enumerate(pool):
        generator = _random(seed, " ".join(words))
        start = 0
        while True:
            place = _Place(
                document=index,
                start=start,
                context=generator.randint(*CONTEXT_WORDS),
                choice=generator.randint(*CHOICE_WORDS),
            )
            if place.end > len(words):
                break
            found.append((generator.random(), place))
            start += place.choice + _STRIDE
    return [place for _, place in sorted(found, key=lambda pair: pair[0])]


def _distractors(pool: Sequence[list[str]], place: _Place, generator: random.Random) -> list[str]:
    """Return wrong continuations that overlap neither the passage nor each other, fewer than needed where none fit."""
    taken = {place.document: [(place.start, place.end)]}
    right = " ".join(pool[place.document][place.end - place.choice : place.end])
    found: list[str] = []
    for attempt in range(80):
        document = place.document if attempt < 20 else generator.randrange(len(pool))
        words = pool[document]
        start = generator.randrange(max(1, len(words) - place.choice + 1))
        end = start + place.choice
        text = " ".join(words[start:end])
        overlaps = any(start < high and low < end for low, high in taken.get(document, ()))
        if end > len(words) or overlaps or text == right or text in found:
            continue
        taken.setdefault(document, []).append((start, end))
        found.append(text)
        if len(found) == CHOICES - 1:
            break
    return found


def _item(spec: str, pool: Sequence[list[str]], place: _Place, seed: int) -> Item | None:
    words = pool[place.document][place.start : place.end]
    context, right = " ".join(words[: place.context]), " ".join(words[place.context :])
    generator = _random(seed, context, right)
    texts = _distractors(pool, place, generator)
    if len(texts) < CHOICES - 1:
        return None
    gold = generator.randrange(CHOICES)
    texts.insert(gold, right)
    return Item(
        task=spec,
        id=content_hash(context, *texts),
        contexts=(context,),
        choices=tuple(f" {text}" for text in texts),
        gold=gold,
        lengths=tuple(map(len, texts)),
    )


def cloze_items(spec: str, role: Role, draw: Draw) -> tuple[Item, ...]:
    """Return the items of a cloze task for one role, in an order drawn by the seed.

    Args:
        spec: ``cloze/<corpus>``.
        role: which of the three disjoint sets.
        draw: seed and numbers of items; report items are as many as there are, up to the number asked for.

    Raises:
        DataError: the corpus is too small for the search or select items; the message says how many it gives.
    """
    pool = _pool(spec, role, draw)
    wanted = {"search": draw.search, "select": draw.select, "report": draw.report or _ALL}[role]
    found: dict[str, Item] = {}
    for place in _places(pool, draw.seed):
        item = _item(spec, pool, place, draw.seed)
        if item is not None:
            found[item.id] = item
        if len(found) == wanted:
            break
    if not found or (len(found) < wanted and role != "report"):
        least = 1 if role == "report" else wanted
        raise DataError(f"task {spec!r} must give {least} {role} items, its corpus gives {len(found)}: ask for fewer "
                        "or name a larger corpus")  # fmt: skip
    return tuple(found.values())
