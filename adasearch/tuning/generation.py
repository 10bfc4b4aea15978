"""Text that the dense model makes itself: the corpus ``self``, for users who have no data or may not use any.

Tokens are drawn one by one from the model's own distribution, from its first token on, as Liu et al. do for LLM-QAT
(2024) and Williams et al. (Self-calibration for Language Model Quantization and Pruning, 2025) for calibration. A
document is not ended at an end-of-text token: a base model goes on with another text, an instruction-tuned one with
the next turn of the conversation. Special tokens stay in the text, and the tokenizer reads them back as such.

A text is kept on disk by all that it follows from: it is made once, by one process, and is the same in every trial.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adasearch.documents import fingerprint
from adasearch.errors import ConfigError, StorageError
from adasearch.pruning.statistics_cache import locked, shrink
from adasearch.sections import Sampling
from adasearch.tuning.scoring import max_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 32
"""Documents that are made together. What is drawn depends on it, so it is the same on every device."""
_VERSION = 1
"""Raised when the same settings would give another text than before."""
_MAX_BYTES = 256 * 2**20  # of all texts that are kept
_COLUMN = "document"  # of a file's rows, each of which is a document of its own


def check(sampling: Sampling, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a model can make such text.

    Raises:
        ConfigError: documents are longer than the model reads, or the tokenizer has no token to begin with.
    """
    limit = max_length(model.config, tokenizer)
    if sampling.length >= limit:
        raise ConfigError("corpus", f"self:length must be below {limit}, which the model reads, is {sampling.length}")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError("corpus", "self needs a tokenizer with a bos or eos token to begin with, it has neither")


@torch.no_grad()
def sample(model: Any, start: int, sampling: Sampling, first: int, count: int) -> Tensor:
    """Return documents (count × length, int64) drawn token by token with p = softmax(logits / temperature).

    Every step reads one token of each document; keys and values of those before are kept.

    Args:
        model: a causal language model of transformers, in eval mode.
        start: token that all documents begin with; it is no part of them.
        sampling: see there.
        first: number of the first document; with `sampling.seed` it decides what is drawn.
        count: how many.
    """
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator(device).manual_seed(int(fingerprint((sampling.seed, first))[:15], 16))
    token = torch.full((count, 1), start, dtype=torch.long, device=device)
    found, kept = list[Tensor](), None
    for _ in range(sampling.length):
        out = model(input_ids=token, past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        chances = (out.logits[:, -1].float() / sampling.temperature).softmax(-1)
        token = torch.multinomial(chances, 1, generator=generator)
        found.append(token)
    return torch.cat(found, 1).cpu()


def documents(model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> list[str]:
    """Return the text of all documents; fewer are the first of more, up to whole batches.

    Raises:
        ConfigError: the model cannot make them.
    """
    check(sampling, model, tokenizer)
    start: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts: list[str] = []
    for first in range(0, sampling.documents, BATCH):
        drawn = sample(model, start, sampling, first, BATCH)
        texts += tokenizer.batch_decode(drawn, clean_up_tokenization_spaces=False)
    return texts[: sampling.documents]


def obtain(folder: Path, model: str, sampling: Sampling, make: Callable[[], list[str]]) -> Path:
    """Return the file of a text, made where it is not there: of several processes one does, the others wait.

    Args:
        folder: of the cache, made when it is missing; may be deleted at any time.
        model: what tells the model from any other.
        sampling: how it makes the text.
        make: gives the documents.

    Raises:
        StorageError: the folder cannot be written.
    """
    path = folder / f"{fingerprint((model, sampling, _VERSION))}.jsonl"
    if _sound(path, sampling):
        return path
    with locked(path.with_suffix(".lock")):
        if not _sound(path, sampling):
            texts = make()
            draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
            try:
                draft.write_text("".join(json.dumps({_COLUMN: text}) + "\n" for text in texts), encoding="utf-8")
                draft.replace(path)
                shrink(folder, _MAX_BYTES, lambda name: True if name.endswith(".jsonl") else None)
            except OSError as error:
                raise StorageError(f"the cache folder {folder} must be writable: {error}") from error
            finally:
                draft.unlink(missing_ok=True)
    return path


def _sound(path: Path, sampling: Sampling) -> bool:
    """Return whether a file holds a whole text; it counts as used now."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except (OSError, ValueError):
        return False
    return len(rows) == sampling.documents and all(_COLUMN in row for row in rows)
