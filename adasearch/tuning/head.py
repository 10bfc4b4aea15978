"""The output head over a large vocabulary, some rows at a time in memory that is made once.

For a small model the logits are the largest tensors of all: 512 positions over 49k tokens are 100 MB in float32. Fresh
memory of that size costs more than what is computed in it, so the rows go through buffers: `lines` rows of logits
in the dtype of the model, as many as a matrix product wants, and `pieces` rows in float32, as many as a cache holds.

Shape letters: S rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_LOGITS = 2**24
"""Elements of logits held at a time: at most 64 MiB."""
_CACHED_LOGITS = 2**20
"""Elements of float32 logits whose softmax stays in a CPU's cache: 4 MiB."""


class HeadRows:
    """Buffers for the rows of one head (weight V × D, bias V or None); iterate over `chunks`.

    Args:
        weight: of the head.
        bias: of the head.
        rows: how many rows there will be at most.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        vocabulary = weight.shape[0]
        self.weight, self.bias = weight, bias
        self._lines = max(1, min(rows, _MAX_LOGITS // vocabulary))
        cached = _CACHED_LOGITS // vocabulary if weight.device.type == "cpu" else self._lines
        self._pieces = max(1, min(self._lines, cached))
        self._logits = torch.empty(self._lines, vocabulary, dtype=weight.dtype, device=weight.device)
        self._wide = torch.empty(self._pieces, vocabulary, dtype=torch.float32, device=weight.device)
        self._spare = torch.empty_like(self._wide)

    def chunks(self, states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows of `states` (S × D), their logits); the logits are a buffer, good until the next ones."""
        for begin in range(0, len(states), self._lines):
            rows = slice(begin, min(begin + self._lines, len(states)))
            logits = self._logits[: rows.stop - begin]
            torch.mm(states[rows], self.weight.T, out=logits)
            yield rows, logits if self.bias is None else logits.add_(self.bias)

    def pieces(self, logits: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows of `logits`, the same in float32, a float32 buffer of that shape for what comes of them)."""
        for begin in range(0, len(logits), self._pieces):
            rows = slice(begin, min(begin + self._pieces, len(logits)))
            size = rows.stop - begin
            yield rows, self._wide[:size].copy_(logits[rows]), self._spare[:size]
