"""Which rows of the embedding stay, and the smaller tokenizer: pure functions of the parsed ``tokenizer.json``.

A row of the embedding is a token. What every text may need stays always: the alphabet that words fall back to, special
tokens, and what the tokenizer names by number. Other tokens stay by how often a corpus uses them.

Byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909) joins neighbours, the merge of lowest rank first. No merge
ever crosses the border of a token that comes out, so inside of it the same merges happen as if it stood alone: a token
has one chain of merges, the one that its own spelling takes. A kept token keeps the tokens of its chain. Then text
whose tokens are all kept encodes as before: the merges left are a part of the old ones in their old order, and hold
every merge that is taken. Other words end in more pieces, and every text decodes to what it did.

A Unigram model (Kudo 2018, arXiv 1804.10959) takes the segmentation of highest score: with fewer pieces and the same
scores the best one is the same while its pieces are all there, and no closure is needed. An unknown character scores 10
less than the worst piece, so that piece stays too.

Shape letters: V rows of the embedding, K rows kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adasearch.errors import ConfigError

_WHERE = "vocabulary.remove"
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SECTIONS = ("normalizer", "pre_tokenizer", "decoder")
_TEXT_KEYS = frozenset({"replacement", "content", "prepend", "String"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Vocabulary:
    """What a tokenizer's file says about its tokens.

    Args:
        ids: row of every piece of the model by its spelling; added tokens that are no pieces are left out.
        ranks: rank of every merge by the pair that it joins; empty where there are no merges.
        merging: whether words are built by merges.
        always: rows that stay, see `must_keep`.
        tokens: all rows that a token stands for.
    """

    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]
    merging: bool
    always: frozenset[int]
    tokens: frozenset[int]
    chains: dict[str, frozenset[int]] = field(default_factory=dict)

    def chain(self, piece: str) -> frozenset[int]:
        """Return the rows of the tokens that `piece` is built from and itself; itself alone where none build it."""
        if piece not in self.chains:
            self.chains[piece] = self._built(piece) if self.merging else frozenset({self.ids[piece]})
        return self.chains[piece]

    def _built(self, piece: str) -> frozenset[int]:
        parts = list(piece)
        found = set(parts)
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
            place = ranks.index(min(ranks))  # of equal ranks the leftmost is taken
            if ranks[place] == math.inf:
                return frozenset({self.ids[piece]})  # never comes out of merges: matched whole, or not at all
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            found.add(parts[place])
        if not found <= self.ids.keys():
            return frozenset({self.ids[piece]})  # a character without a token falls back to bytes
        return frozenset(self.ids[part] for part in found)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Return the two parts of a merge, written as "a b" by old files and as ["a", "b"] by new ones."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _pieces(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the row of every piece of the model.

    Raises:
        ConfigError: the model is of a kind whose text could not be kept lossless.
    """
    kind = model.get("type")
    if kind == "BPE":
        marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
        if marks:
            raise ConfigError(_WHERE, f"the tokenizer's BPE must mark no parts of words, given {marks[0]}")
        return dict(model["vocab"])
    if kind == "Unigram":
        return {piece: row for row, (piece, _) in enumerate(model["vocab"])}
    raise ConfigError(_WHERE, f"the tokenizer must be a BPE or Unigram model, given {kind}; leave the vocabulary whole")


def _values(node: Any, keys: Collection[str]) -> Iterator[Any]:
    """Yield the values under any of `keys` anywhere in a section of the file."""
    if isinstance(node, list):
        for child in node:
            yield from _values(child, keys)
    elif isinstance(node, dict):
        for key, child in node.items():
            if key in keys:
                yield child
            yield from _values(child, keys)


def _falls_back(data: Mapping[str, Any], ids: Mapping[str, int]) -> bool:
    """Return whether a character without a token is written in bytes, and read again."""
    whole = bool(data["model"].get("byte_fallback")) and all(byte in ids for byte in _BYTES)
    return whole and "ByteFallback" in _values(data.get("decoder"), {"type"})


def _alphabet(data: Mapping[str, Any], ids: Mapping[str, int]) -> Iterator[int]:
    """Yield the rows that any text may be written with: all characters, or bytes and what stands for spaces.

    The characters of a byte-level vocabulary are its bytes. Under byte fallback a character is free to go, but for
    those that the tokenizer itself writes and reads: a space comes back only from the token of its sign.
    """
    if not _falls_back(data, ids):
        yield from (row for piece, row in ids.items() if len(piece) == 1)
    yield from (ids[byte] for byte in _BYTES if byte in ids and data["model"].get("byte_fallback"))
    for section in _SECTIONS:
        for text in _values(data.get(section), _TEXT_KEYS):
            yield from (ids[letter] for letter in text or "" if letter in ids)


def _post_processor(node: Any, row: Callable[[int], int]) -> Any:
    """Return a post-processor's section with `row` of every row that it names.

    Raises:
        ConfigError: it is of a kind not known here.
    """
    if node is None or node["type"] == "ByteLevel":
        return node
    kind = node["type"]
    if kind == "Sequence":
        return {**node, "processors": [_post_processor(child, row) for child in node["processors"]]}
    if kind == "TemplateProcessing":
        named = {
            name: {**token, "ids": [row(i) for i in token["ids"]]} for name, token in node["special_tokens"].items()
        }
        return {**node, "special_tokens": named}
    if kind in {"BertProcessing", "RobertaProcessing"}:
        return {**node, **{key: [node[key][0], row(node[key][1])] for key in ("sep", "cls")}}
    raise ConfigError(_WHERE, f"the tokenizer's post-processor must be one whose tokens are known, given {kind}")


def _read(data: Mapping[str, Any]) -> _Vocabulary:
    model, ids = data["model"], _pieces(data["model"])
    added = {token["id"] for token in data["added_tokens"]}
    always = {*added, *_alphabet(data, ids)}

    def note(row: int) -> int:
        always.add(row)
        return row

    _post_processor(data.get("post_processor"), note)
    if data.get("padding"):
        note(data["padding"]["pad_id"])
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            note(model["unk_id"])
        scores = [score for _, score in model["vocab"]]
        note(scores.index(min(scores)))
    elif model.get("unk_token") in ids:
        note(ids[model["unk_token"]])
    return _Vocabulary(
        ids=ids,
        ranks={_pair(merge): rank for rank, merge in enumerate(model.get("merges", ()))},
        merging=model["type"] == "BPE",
        always=frozenset(always),
        tokens=frozenset(ids.values()) | added,
    )


def counts(tokens: Tensor, rows: int) -> Tensor:
    """Return how often each row is used (V, int64); counts of several corpora are added.

    Args:
        tokens: token ids, of any shape.
        rows: V, rows of the embedding.
    """
    found = torch.bincount(tokens.flatten().cpu(), minlength=rows)
    assert len(found) == rows, f"token {len(found) - 1} has no row among {rows}"
    return found


def must_keep(tokenizer: Mapping[str, Any]) -> frozenset[int]:
    """Return the rows that stay whatever their use, so that every text encodes and decodes as it did.

    They are the added tokens (special or not), the alphabet (bytes, or every single character where nothing falls back
    to bytes), the unknown token, the worst piece of a Unigram model, and what post-processing and padding insert.

    Args:
        tokenizer: a parsed ``tokenizer.json``.

    Raises:
        ConfigError: the tokenizer is of a kind that cannot be shrunk.
    """
    return _read(tokenizer).always


def closure(rows: Collection[int], tokenizer: Mapping[str, Any]) -> frozenset[int]:
    """Return `rows` and those of all tokens that merges build theirs from.

    Args:
        rows: rows of any tokens.
        tokenizer: a parsed ``tokenizer.json``.

    Raises:
        ConfigError: the tokenizer is of a kind that cannot be shrunk.
    """
    vocabulary = _read(tokenizer)
    pieces = {row: piece for piece, row in vocabulary.ids.items()}
    return frozenset(rows).union(*(vocabulary.chain(pieces[row]) for row in rows if row in pieces))


def choose(uses: Tensor, keep: int, tokenizer: Mapping[str, Any], also: Collection[int] = ()) -> tuple[int, ...]:
    """Return the `keep` rows that stay, ascending.

    First those of `must_keep` and `also`, then by use (ties by row), each with the tokens that it is built from; where
    these do not fit any more, the next that does. Rows that no token stands for, as of an embedding padded to a round
    size, stay last.

    Args:
        uses: how often each row is used (V).
        keep: K.
        tokenizer: a parsed ``tokenizer.json``.
        also: rows that stay too, such as those that the model's config names.

    Raises:
        ConfigError: `keep` is less than what must stay or more than there is, or the tokenizer cannot be shrunk.
    """
    vocabulary = _read(tokenizer)
    chosen = {*vocabulary.always, *also}
    if not len(chosen) <= keep <= len(uses):
        limits = f"at least {len(chosen)} (special tokens and the alphabet) and at most all {len(uses)}"
        raise ConfigError(_WHERE, f"must leave {limits} rows of the vocabulary, leaves {keep}")
    pieces = {row: piece for piece, row in vocabulary.ids.items()}
    amounts = uses.tolist()
    order = sorted(range(len(amounts)), key=lambda row: (row not in vocabulary.tokens, -amounts[row], row))
    while len(chosen) < keep:  # a shortest token that is left out lacks none of its parts: every pass takes one
        for row in order:
            new = (vocabulary.chain(pieces[row]) if row in pieces else {row}) - chosen
            if len(chosen) + len(new) <= keep:
                chosen |= new
    return tuple(sorted(chosen))


def new_ids(kept: Sequence[int]) -> dict[int, int]:
    """Return the new row of every kept one: its place among them."""
    return {row: place for place, row in enumerate(kept)}


def shrink(tokenizer: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of the kept rows, renumbered by their place.

    Merges stay where both parts and their result do, in their order. Pre-tokenizer, normalizer and decoder stay as they
    are.

    Args:
        tokenizer: a parsed ``tokenizer.json``; it is not changed.
        kept: rows, ascending, such as `choose` returns.

    Raises:
        ConfigError: a row that must stay is not kept, or the tokenizer cannot be shrunk.
    """
    assert all(a < b for a, b in itertools.pairwise(kept)), "rows must ascend"
    vocabulary, new = _read(tokenizer), new_ids(kept)
    lost = sorted(vocabulary.always - new.keys())
    if lost:
        raise ConfigError(_WHERE, f"must keep row {lost[0]}: a special token or of the alphabet ({len(lost)} in all)")
    model = dict(tokenizer["model"])
    pieces = {piece: new[row] for piece, row in sorted(vocabulary.ids.items(), key=lambda item: item[1]) if row in new}
    if vocabulary.merging:
        model["vocab"] = pieces
        model["merges"] = [
            merge for merge in model["merges"] if {*_pair(merge), "".join(_pair(merge))} <= pieces.keys()
        ]
    else:
        model["vocab"] = [entry for row, entry in enumerate(model["vocab"]) if row in new]
        model["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    result = {**tokenizer, "model": model}
    result["added_tokens"] = [{**token, "id": new[token["id"]]} for token in tokenizer["added_tokens"]]
    result["post_processor"] = _post_processor(tokenizer.get("post_processor"), new.__getitem__)
    if tokenizer.get("padding"):
        result["padding"] = {**tokenizer["padding"], "pad_id": new[tokenizer["padding"]["pad_id"]]}
    return result
