"""What a recovery trains on: documents of one corpus or of a mixture, laid end to end or packed whole.

Of a mixture the next document always comes from the corpus whose share lags most: the one of the fewest tokens read
so far for its weight. So the shares of the weights are met in tokens, up to a document or so, at every length of the
text; each corpus is gone through in an order of its own, again and again where it is short.

Shape letters: N tokens of the text, T tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from adasearch.chat import Written
from adasearch.data import Guard, Texts
from adasearch.documents import value
from adasearch.errors import DataError
from adasearch.sections import Mix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN = 16
"""Sequences that are filled at the same time; more waste less room and keep more text waiting."""
_LEAST = 2  # tokens of a piece, and of a room: the second is the first that can be predicted


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Marks:
    """Which tokens belong together, and which count; both of the shape of the tokens.

    Args:
        segments: equal numbers side by side are one document; what is not in the same sequence never is (int).
        counted: whether to predict the token is part of the loss (bool).
    """

    segments: Tensor
    counted: Tensor

    def to(self, device: str | torch.device) -> Marks:
        """Return the same on a device."""
        return Marks(segments=self.segments.to(device), counted=self.counted.to(device))

    def lines(self, length: int) -> Marks:
        """Return the marks of a whole stream as those of its sequences (B × T)."""
        return Marks(segments=self.segments.view(-1, length), counted=self.counted.view(-1, length))

    def predicted(self) -> Tensor:
        """Return which positions predict a token that counts (B × (T - 1), bool), of marks of B × T tokens.

        None predicts the first token of another document.
        """
        return self.counted[:, 1:] & (self.segments[:, 1:] == self.segments[:, :-1])


@value
class TrainingText:
    """The text of one recovery.

    Args:
        tokens: token ids (N, int64); whole sequences where documents are packed.
        marks: of those tokens, None for a plain stream, of which all count.
        epochs: how often the corpus was gone through that was gone through most (fraction).
        shares: tokens read of each corpus of a mixture, as fractions of all that were read.
        dropped: documents that were left out because a report item stands in them, where somebody counted.
        held: text of documents that are not in this one, to measure a training on; None where none was asked for.
    """

    tokens: Any
    marks: Any = None
    epochs: float = 0.0
    shares: tuple[float, ...] = ()
    dropped: int = 0
    held: TrainingText | None = None


@value
class Reading:
    """What a recovery asks for, see `sections.TextOptions`; `tokens` and `length` as in its options."""

    text: Mix
    tokens: int
    length: int
    seed: int
    packing: Literal["stream", "documents"] = "stream"
    loss: Literal["all", "answers"] = "all"


class _Source:
    """One corpus of a mixture: its documents without end, and how much was read of it."""

    def __init__(self, texts: Texts, weight: float, end: list[int], generator: np.random.Generator) -> None:
        self.texts, self.weight, self._end = texts, weight, end
        self.read, self.passes = 0, 0.0
        self._drawn = self._draw(generator)

    def _draw(self, generator: np.random.Generator) -> Iterator[Written]:
        while True:
            before = self.read
            for index in generator.permutation(len(self.texts)).tolist():
                found = self.texts[index]
                self.passes += 1 / len(self.texts)
                if not found.ids:
                    continue
                if found.answers is None:  # conversations end as their template says
                    found = Written(found.ids + self._end)
                self.read += len(found.ids)
                yield found
            if self.read == before:
                name, part = self.texts.corpus, self.texts.part
                raise DataError(f"corpus {name!r}: its part {part!r} must hold a document that may be read, all "
                                f"{len(self.texts)} are empty or hold report items")  # fmt: skip

    @property
    def lag(self) -> float:
        return self.read / self.weight

    def next(self) -> Written:
        return next(self._drawn)


def _mixed(sources: list[_Source]) -> Iterator[Written]:
    """Yield documents without end, each from the source that lags most behind its weight."""
    while True:
        yield min(sources, key=lambda source: source.lag).next()


def training_text(
    tokenizer: PreTrainedTokenizerBase,
    reading: Reading,
    data_root: str | None = None,
    guard: Guard | None = None,
    part: str = "fit",
) -> TrainingText:
    """Return the text of a recovery: equal arguments give equal tokens.

    Plain documents end with the eos token, conversations as the chat template has it.

    Args:
        tokenizer: of the model that is to be trained.
        reading: what is asked for.
        data_root: folder of mirrored dataset repositories.
        guard: takes documents out, see `data.Texts`.
        part: a name of `data.PARTS`.

    Raises:
        ConfigError: unknown corpus.
        DataError: a corpus cannot be read, holds nothing to train on, or less than one sequence.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    parts = reading.text.mix
    seeds = [[reading.seed, index] for index in range(len(parts))] if len(parts) > 1 else [[reading.seed]]
    sources = [
        _Source(Texts(tokenizer, p.corpus, part, data_root, guard=guard), p.weight, end, np.random.default_rng(seed))
        for p, seed in zip(parts, seeds, strict=True)
    ]
    build = _packed if reading.packing == "documents" else _stream
    tokens, marks = build(_mixed(sources), reading, end)
    _check_enough(sources, reading)
    total = sum(source.read for source in sources)
    shares = tuple(source.read / total for source in sources) if len(sources) > 1 else ()
    return TrainingText(tokens=tokens, marks=marks, epochs=max(source.passes for source in sources), shares=shares)


def one_pass(text: TrainingText, length: int) -> TrainingText:
    """Return the beginning of a text before its documents come again, in whole sequences, one at least.

    Packed documents wait for room, so that a few may come again before the last was there.
    """
    kept = max(length, int(len(text.tokens) / max(1.0, text.epochs)) // length * length)
    marks = text.marks and Marks(segments=text.marks.segments[:kept], counted=text.marks.counted[:kept])
    return dataclasses.replace(text, tokens=text.tokens[:kept], marks=marks, epochs=min(1.0, text.epochs))


def _check_enough(sources: list[_Source], reading: Reading) -> None:
    """Refuse a corpus that was gone through and does not fill one sequence: it would be learnt by heart."""
    for source in sources:
        whole = sum(len(source.texts[index].ids) for index in range(len(source.texts))) if source.passes > 1 else None
        if whole is not None and whole < min(reading.length, reading.tokens):
            raise DataError(f"corpus {source.texts.corpus!r}: part {source.texts.part!r} holds {whole} tokens that may "
                            f"be read, a sequence needs {reading.length}: name a larger corpus")  # fmt: skip


def _stream(documents: Iterator[Written], reading: Reading, _end: list[int]) -> tuple[Tensor, None]:
    """Return documents laid end to end, cut to as many tokens as are asked for."""
    stream: list[int] = []
    while len(stream) < reading.tokens:
        stream += next(documents).ids
    return torch.tensor(stream[: reading.tokens], dtype=torch.long), None


class _Sequence:
    """A sequence that is being filled with pieces of documents."""

    def __init__(self, length: int) -> None:
        self.ids, self.segments, self.counted = list[int](), list[int](), list[bool]()
        self.room, self._pieces, self._length = length, 0, length

    def add(self, ids: list[int], counted: list[bool]) -> None:
        self.ids += ids
        self.segments += [self._pieces] * len(ids)
        self.counted += counted
        self.room -= len(ids)
        self._pieces += 1

    def close(self, fill: int) -> None:
        self.add([fill] * self.room, [False] * self.room)


def _pieces(documents: Iterator[Written], length: int, *, answers: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield documents, those longer than a sequence in pieces, and which tokens count; none of which no token does.

    Raises:
        DataError: no document of many has a token that counts.
    """
    barren = 0
    while barren < 10_000:
        ids, said = next(documents)
        counted = said if answers and said is not None else [True] * len(ids)
        barren += 1
        for begin in range(0, len(ids), length):
            piece = slice(begin, begin + length)
            if any(counted[piece][1:]):
                barren = 0
                yield ids[piece], counted[piece]
    raise DataError("recovery text must hold tokens that count: its documents have no answers, or are single tokens")


def _packed(documents: Iterator[Written], reading: Reading, end: list[int]) -> tuple[Tensor, Marks]:
    """Return whole sequences of pieces of documents, each put where it leaves the least room; the rest is not counted.

    Best fit keeps documents whole that are no longer than a sequence (Ding et al., Fewer Truncations Improve Language
    Modeling, ICML 2024).
    """
    wanted = -(-reading.tokens // reading.length)
    waiting: list[_Sequence] = []
    closed: list[_Sequence] = []
    for ids, counted in _pieces(documents, reading.length, answers=reading.loss == "answers"):
        fits = [sequence for sequence in waiting if sequence.room >= len(ids)]
        if not fits:
            fits = [_Sequence(reading.length)]
            waiting += fits
        best = min(fits, key=lambda sequence: sequence.room)
        best.add(ids, counted)
        fullest = min(waiting, key=lambda sequence: sequence.room)
        if fullest.room < _LEAST or len(waiting) > _OPEN:
            waiting.remove(fullest)
            fullest.close(*(end or [0]))
            closed.append(fullest)
        if len(closed) == wanted:
            break
    tokens = torch.tensor([s.ids for s in closed], dtype=torch.long).flatten()
    segments = torch.tensor([s.segments for s in closed], dtype=torch.int32).flatten()
    return tokens, Marks(segments=segments, counted=torch.tensor([s.counted for s in closed]).flatten())
