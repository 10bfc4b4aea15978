"""Perplexity over the same text under another tokenizer: nats of the text per token of the dense model's tokenizer.

A smaller vocabulary writes a text in more tokens, so that means over its own tokens do not compare: each is easier, and
there are more of them. What compares is the cost of the text. It is cut where the windows of the dense tokenizer begin,
what is predicted is the same text, and the cost is divided by the same number.

Shape letters: N windows, W tokens of the longest window, T tokens of the text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adasearch.errors import DataError
from adasearch.tuning.evaluation import perplexity_of, total_nats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAME_PLACE = 1 << 20  # more tokens than begin at one character: a character has at most 4 bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AlignedText:
    """A text in the tokens of one tokenizer and the windows of another, the reference.

    Args:
        tokens: N × W token ids, each window's own first, then zeros.
        scored: N × W, true for the tokens that are predicted.
        reference: how many tokens the reference predicts of the same text.
        size: bytes (UTF-8) of the text that is predicted.
    """

    tokens: torch.Tensor
    scored: torch.Tensor
    reference: int
    size: int


def _placed(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tokens of a text, the character that each begins at, and a place that tells them all apart (T each).

    The bytes of one character may be several tokens, which all begin at it: the place counts them.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(found["input_ids"], dtype=np.int64)
    starts = np.maximum.accumulate(np.array([start for start, _ in found["offset_mapping"]], dtype=np.int64))
    return ids, starts, starts * _SAME_PLACE + np.arange(len(ids)) - np.searchsorted(starts, starts)


def align(
    text: str,
    reference: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    limit: int | None = None,
) -> AlignedText:
    """Return the text of the reference's whole windows in tokens of another tokenizer.

    The text is encoded once, as a whole, and a token belongs to the window that it begins in: none is torn apart, and
    none is made that a reader of the text would not see. Given is, as in `perplexity`, the text of the first token of
    the reference's window, and at least one token; a token that goes on beyond that text is predicted, so that a
    smaller vocabulary is never flattered there. With the reference itself the windows are those of `perplexity`.

    Args:
        text: contiguous text.
        reference: a fast tokenizer, of the dense model.
        tokenizer: a fast tokenizer, of the model to be scored.
        window: tokens of the reference in a window, at least 2.
        limit: tokens of the reference that are read at most; None reads all.

    Raises:
        DataError: the text is shorter than a window.
    """
    _, starts, old = _placed(reference, text)
    count = min(len(old), limit or len(old)) // window if window > 1 else 0
    if count < 1:
        raise DataError(
            f"perplexity needs a window of 2 tokens or more and as much text, given {window} and {len(old)}"
        )
    ids, _, new = _placed(tokenizer, text)
    begins = np.arange(count) * window
    edges = np.append(old, np.iinfo(np.int64).max)[np.append(begins, count * window)]
    cuts = np.searchsorted(new, edges)
    given = np.maximum(np.searchsorted(new[1:], old[begins + 1], side="right"), cuts[:-1] + 1)
    places = np.arange(np.diff(cuts).max())
    index = cuts[:-1, None] + places
    inside = index < cuts[1:, None]
    ends = np.append(starts, len(text))
    predicted = zip(ends[begins + 1].tolist(), ends[begins + window].tolist(), strict=True)
    return AlignedText(
        tokens=torch.from_numpy(np.where(inside, ids[np.minimum(index, len(ids) - 1)], 0)),
        scored=torch.from_numpy(inside & (index >= given[:, None])),
        reference=count * (window - 1),
        size=sum(len(text[begin:end].encode()) for begin, end in predicted),
    )


def aligned_perplexity(model: Any, text: AlignedText, token_budget: int | None = None) -> float:
    """Return exp(nats of the text / tokens of the reference): what compares across vocabularies.

    Args:
        model: a causal language model with the modules `model` and `lm_head`, in eval mode.
        text: in the tokens of `model`.
        token_budget: tokens of a batch; None suits the model's device.

    Raises:
        TrialError: the model gives values that are not finite.
    """
    return perplexity_of(total_nats(model, text.tokens, text.scored, token_budget), text.reference)


def bits_per_byte(perplexity: float, text: AlignedText) -> float:
    """Return the bits that a byte of the text costs at a perplexity per token of the reference."""
    return math.log2(perplexity) * text.reference / text.size
