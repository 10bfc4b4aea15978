"""Log-likelihoods of choices: the numbers that lm-eval's Hugging Face model gives, from a quarter of the tokens.

All choices of an item lie in one row, after the tokens that they share: choice c sees the shared tokens and itself, and
its positions go on from theirs. The output projection runs only on the positions that predict a scored token.

Shape letters: B rows, T tokens of a row, S positions that predict scored tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adasearch.errors import DataError, TrialError
from adasearch.tuning import decoder
from adasearch.tuning.head import HeadRows
from adasearch.tuning.items import Item

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_DEFAULT_LENGTH = 2048  # of a model that states none, as lm-eval has it
_UNSET_LENGTH = 10**18  # what tokenizers say who know no length
_CPU_TOKENS, _DEVICE_TOKENS = 1_024, 32_768


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedItem:
    """The token sequences of an item's choices: choice c is `prefix` followed by `branches[c]`.

    Args:
        prefix: tokens that all sequences begin with (int32 vector), never the last one of a sequence.
        branches: what follows (int32 vectors of at least one token).
        scored: how many tokens at the end of each sequence are the continuation.
    """

    prefix: np.ndarray
    branches: tuple[np.ndarray, ...]
    scored: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Return the length of the row that holds all choices; the last token of a sequence predicts nothing."""
        return len(self.prefix) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ItemScores:
    """For each item the log-likelihood of every choice (float64 vector)."""

    logliks: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Row:
    """One row of a batch: its T tokens, and for each scored token where it is predicted and whose choice it is.

    `segments` is 0 for shared tokens, c + 1 for those of branch c; `slots` numbers the choices of all rows.
    """

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    slots: np.ndarray

    @property
    def branched(self) -> bool:
        return bool(self.segments.any())


def max_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a model reads at most, found where lm-eval looks for it."""
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < _UNSET_LENGTH else _DEFAULT_LENGTH


class _PairEncoder:
    """Tokenises context and continuation as lm-eval does, each distinct context once.

    The context's trailing spaces go to the continuation; both are encoded as one text, and the continuation's tokens
    are those beyond as many as the context alone has. Special tokens are the tokenizer's own choice, unless the text
    begins with the prefix token already. An empty context is the prefix token (bos, else eos).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        bos = tokenizer.bos_token_id
        self.start = bos if bos is not None else tokenizer.eos_token_id
        self.start_text = str(tokenizer.decode(self.start))

    def _ids(self, text: str) -> list[int]:
        if text.startswith(self.start_text):
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return list(self.tokenizer.encode(text))

    def _pair(self, context: str, continuation: str, context_ids: list[int]) -> tuple[list[int], list[int]]:
        if context:
            return context_ids, self._ids(context + continuation)[len(context_ids) :]
        ids = list(self.tokenizer.encode(continuation, add_special_tokens=False))
        return (ids[:1], ids[1:]) if ids[:1] == [self.start] else ([self.start], ids)

    def sequences(self, item: Item) -> Iterator[tuple[list[int], int]]:
        """Yield for each choice its tokens, cut at the left to what the model reads, and how many are scored."""
        known: dict[str, list[int]] = {}
        for context, continuation in item.pairs():
            bare = context.rstrip()
            if bare not in known and bare:
                known[bare] = self._ids(bare)
            head, scored = self._pair(bare, context[len(bare) :] + continuation, known.get(bare, []))
            if not scored or len(scored) > self.limit:
                problem = f"must have between 1 and {self.limit} tokens, it has {len(scored)}"
                raise DataError(f"task {item.task!r}: the choice {continuation!r} of item {item.id} {problem}")
            yield (head + scored)[-(self.limit + 1) :], len(scored)


def _shared(sequences: Sequence[np.ndarray]) -> int:
    """Return the length of the longest common beginning that leaves every sequence a token."""
    least = min(map(len, sequences)) - 1
    first = sequences[0][:least]
    differs = np.zeros(least, dtype=bool)
    for other in sequences[1:]:
        differs |= first != other[:least]
    return int(differs.argmax()) if differs.any() else least


def encode(items: Iterable[Item], tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[EncodedItem, ...]:
    """Return the token sequences of items, tokenised as lm-eval's Hugging Face model does.

    Args:
        items: as `load_items` gives them.
        tokenizer: of the model.
        limit: tokens that the model reads at most (`max_length`); longer sequences lose their beginning.

    Raises:
        DataError: a choice has no token of its own, or more than the model reads.
    """
    encoder = _PairEncoder(tokenizer, limit)
    encoded = []
    for item in items:
        pairs = list(encoder.sequences(item))
        sequences = [np.array(ids, dtype=np.int32) for ids, _ in pairs]
        length = _shared(sequences)
        branches = tuple(ids[length:] for ids in sequences)
        scored = tuple(count for _, count in pairs)
        encoded.append(EncodedItem(prefix=sequences[0][:length].copy(), branches=branches, scored=scored))
    return tuple(encoded)


def _row(item: EncodedItem, slot: int) -> _Row:
    shared = len(item.prefix)
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
        (item.prefix, np.arange(shared), np.zeros(shared, dtype=np.int64))
    ]
    scored: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    begin = shared  # where the branch begins in the row
    for choice, (branch, count) in enumerate(zip(item.branches, item.scored, strict=True)):
        inputs, end = len(branch) - 1, shared + len(branch)
        parts.append((branch[:-1], np.arange(shared, end - 1), np.full(inputs, choice + 1)))
        before = np.arange(end - count - 1, end - 1)  # positions in the sequence that predict the scored tokens
        sequence = np.concatenate((item.prefix, branch))
        sources = np.where(before < shared, before, before - shared + begin)
        scored.append((sources, sequence[before + 1], np.full(count, slot + choice)))
        begin += inputs
    tokens, positions, segments = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    sources, targets, slots = (np.concatenate(columns) for columns in zip(*scored, strict=True))
    return _Row(tokens=tokens, positions=positions, segments=segments, sources=sources, targets=targets, slots=slots)


def _apart(item: EncodedItem) -> Iterator[EncodedItem]:
    """Yield each choice as an item of its own: a plain causal row, for models that take no mask of ours."""
    for branch, count in zip(item.branches, item.scored, strict=True):
        yield EncodedItem(prefix=np.concatenate((item.prefix, branch[:-1])), branches=(branch[-1:],), scored=(count,))


def _rows(encoded: Sequence[EncodedItem], *, packed: bool) -> Iterator[_Row]:
    slot = 0
    for item in encoded:
        for part in (item,) if packed else _apart(item):
            yield _row(part, slot)
            slot += len(part.branches)


def _batches(rows: Iterable[_Row], budget: int) -> Iterator[list[_Row]]:
    """Yield rows of similar length together, as many as `budget` tokens hold with their padding, longest first."""
    batch: list[_Row] = []
    # Rows that need a mask lie together, so that the others keep the attention kernel's causal path.
    for row in sorted(rows, key=lambda row: (row.branched, len(row.tokens)), reverse=True):
        if batch and (row.branched != batch[0].branched or (len(batch) + 1) * len(batch[0].tokens) > budget):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(columns: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    result = np.full((len(columns), max(map(len, columns))), fill, dtype=np.int64)
    for line, column in zip(result, columns, strict=True):
        line[: len(column)] = column
    return torch.from_numpy(result)


def _mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to attention scores, `B x T x T`: 0 where a token sees another, -inf elsewhere.

    Padding (segment -1) sees the shared tokens and itself, so that no line of the softmax is empty.
    """
    key, query = segments[:, None, :], segments[:, :, None]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    seen = causal & ((key == 0) | (key == query))
    hidden = torch.full((), -math.inf, dtype=dtype, device=segments.device)
    return torch.where(seen, torch.zeros((), dtype=dtype, device=segments.device), hidden)


def _hidden(model: Any, rows: Sequence[_Row]) -> torch.Tensor:
    """Return the last hidden states of a batch, `B x T x D`."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    mask = positions = None
    if rows[0].branched:
        mask = _mask(_padded([row.segments for row in rows], -1).to(device), dtype)
        positions = _padded([row.positions for row in rows], 0).to(device)
    tokens = _padded([row.tokens for row in rows], 0).to(device)
    return decoder.last_hidden(model, tokens, mask, positions)


def target_logprobs(
    head: torch.nn.Linear, states: torch.Tensor, lines: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the log-probability of tokens (float32 vector).

    The softmax is taken in float32. It is torch's `log_softmax` because lm-eval's is: over a large vocabulary its
    rounding differs from `logsumexp`'s by 1e-5 a token.

    Args:
        head: the model's output projection, D to V.
        states: `S x D` hidden states.
        lines: for each token the line of `states` that predicts it, ascending.
        targets: the tokens.
    """
    room = HeadRows(head.weight, head.bias, len(states))
    values = []
    for rows, logits in room.chunks(states):
        for piece, wide, spare in room.pieces(logits):
            logprobs = torch.log_softmax(wide, -1, out=spare)
            begin, end = rows.start + piece.start, rows.start + piece.stop
            low, high = torch.searchsorted(lines, torch.tensor([begin, end], device=lines.device)).tolist()
            values.append(logprobs[lines[low:high] - begin, targets[low:high]])
    return torch.cat(values)


def _score_batch(model: Any, rows: Sequence[_Row], sums: np.ndarray) -> None:
    """Add the log-likelihoods of a batch to `sums`."""
    states = _hidden(model, rows)
    flat = np.concatenate([index * states.shape[1] + row.sources for index, row in enumerate(rows)])
    order = np.argsort(flat, kind="stable")
    unique, lines = np.unique(flat[order], return_inverse=True)
    targets = np.concatenate([row.targets for row in rows])[order].astype(np.int64)
    slots = np.concatenate([row.slots for row in rows])[order]
    device = states.device
    chosen = states.reshape(-1, states.shape[-1])[torch.from_numpy(unique).to(device)]
    lines_on, targets_on = torch.from_numpy(lines).to(device), torch.from_numpy(targets).to(device)
    values = target_logprobs(model.lm_head, chosen, lines_on, targets_on)
    np.add.at(sums, slots, values.double().cpu().numpy())


def _longest(encoded: Sequence[EncodedItem]) -> int:
    """Return the length of the longest sequence of a choice."""
    return max((len(e.prefix) + max(map(len, e.branches)) for e in encoded), default=0)


def takes_packed(model: Any, encoded: Sequence[EncodedItem]) -> bool:
    """Return whether a model accepts rows with our mask: not flash attention, nor windows shorter than a row."""
    window = getattr(model.config, "sliding_window", None)
    return model.config._attn_implementation in {"sdpa", "eager"} and (window is None or _longest(encoded) <= window)


@torch.inference_mode()
def score(
    model: Any, encoded: Sequence[EncodedItem], *, token_budget: int | None = None, packed: bool | None = None
) -> ItemScores:
    """Return the log-likelihood of every choice of every item under a model.

    Args:
        model: a causal language model with the modules `model` and `lm_head`, in eval mode.
        encoded: what `encode` made of the items; any part of it gives the same scores.
        token_budget: tokens of a batch with its padding; None suits the model's device.
        packed: all choices of an item in one row; None where the model takes that.

    Raises:
        TrialError: the model gives values that are not finite.
    """
    packed = takes_packed(model, encoded) if packed is None else packed
    budget = token_budget or (_CPU_TOKENS if model.lm_head.weight.device.type == "cpu" else _DEVICE_TOKENS)
    ends = np.cumsum([0, *(len(item.branches) for item in encoded)])
    sums = np.zeros(ends[-1])
    for batch in _batches(_rows(encoded, packed=packed), budget):
        _score_batch(model, batch, sums)
    if not np.isfinite(sums).all():
        wrong = int((~np.isfinite(sums)).sum())
        raise TrialError("nan", f"{wrong} of {len(sums)} log-likelihoods are not finite", "evaluate")
    return ItemScores(logliks=tuple(sums[low:high] for low, high in itertools.pairwise(ends)))


def path_difference(model: Any, encoded: Sequence[EncodedItem], count: int = 8) -> float:
    """Return the largest difference between packed and plain rows over `count` items (nats): a check of a new model."""
    some = encoded[:count]
    pair = [np.concatenate(score(model, some, packed=packed).logliks) for packed in (True, False)]
    return float(np.abs(pair[0] - pair[1]).max())
