"""How far a smaller model is from the dense one before any item is scored: mean KL divergence of its predictions.

The dense side is computed once and kept as hidden states, N x P x D numbers (under 1 MiB for a model of 135 million
parameters at 1024 tokens); its logits, which would take V / D times as much, are made again from them chunk by chunk.

Shape letters: N windows, T tokens of a window, P compared positions of a window, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.errors import TrialError
from adasearch.tuning.decoder import Updates, last_hidden
from adasearch.tuning.head import HeadRows

PHASE = "divergence"
WINDOW = 64
"""Tokens of a window: about as long as the items of multiple-choice tasks."""
STRIDE = 2
"""Every other position is compared: neighbours say nearly the same, and the output head is a third of the cost."""

_BATCH = 4_096  # tokens of a forward pass


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The dense side of the comparison.

    Args:
        tokens: N x T token ids.
        states: N x P x D last hidden states of the dense model at every `STRIDE`-th position.
        head: output projection of the dense model, D to V; its weights are those of the model, not a copy.
    """

    tokens: Tensor
    states: Tensor
    head: nn.Linear

    @property
    def num_bytes(self) -> int:
        """Return the memory that is held beside the dense model's own."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, self.states))


def num_windows(tokens: float) -> int:
    """Return how many windows hold `tokens` tokens, at least 2: an error needs as many."""
    return max(2, round(tokens / WINDOW))


def _states(model: Any, tokens: Tensor, updates: Updates | None = None) -> Tensor:
    """Return the hidden states at the compared positions, N x P x D."""
    batches = torch.split(tokens, max(1, _BATCH // tokens.shape[1]))
    return torch.cat([last_hidden(model, batch, updates=updates)[:, STRIDE - 1 :: STRIDE] for batch in batches])


# no_grad, not inference mode: what a module may keep of its first forward must not bar it from training
@torch.no_grad()
def reference(dense: Any, tokens: Tensor) -> Reference:
    """Return the dense side, to compare any number of smaller models with.

    Args:
        dense: a causal language model with the modules `model` and `lm_head`, in eval mode.
        tokens: N x T token ids, at least two windows.
    """
    tokens = tokens.to(dense.lm_head.weight.device)
    return Reference(tokens=tokens, states=_states(dense, tokens), head=dense.lm_head)


@torch.no_grad()
def divergence(model: Any, against: Reference, updates: Updates | None = None) -> tuple[float, float]:
    """Return the mean over positions of KL(p || q) = sum_v p_v (ln p_v - ln q_v) in nats, and its standard error.

    p is the dense model's prediction of the next token, q the other model's, both over the whole vocabulary, from
    logits in the number format of the models and a softmax in float32 (Kullback & Leibler 1951). The error is that of
    a mean of window means: positions of a window are no independent sample.

    Args:
        model: a model of the same vocabulary, in eval mode; left as it is, and no random number is drawn.
        against: what `reference` returned.
        updates: low-rank updates of the model that are not merged yet, as while it is recovered.

    Raises:
        TrialError: the divergence is not finite.
    """
    windows, positions, _ = against.states.shape
    mine = _states(model, against.tokens, updates).flatten(0, 1)
    theirs = against.states.flatten(0, 1)
    rooms = [HeadRows(head.weight, head.bias, len(mine)) for head in (against.head, model.lm_head)]
    found = []
    for (_, expected), (_, given) in zip(rooms[0].chunks(theirs), rooms[1].chunks(mine), strict=True):
        for (_, p, log_p), (_, q, log_q) in zip(rooms[0].pieces(expected), rooms[1].pieces(given), strict=True):
            torch.log_softmax(p, -1, out=log_p)
            torch.log_softmax(q, -1, out=log_q)
            found.append(torch.linalg.vecdot(torch.exp(log_p, out=p), log_p.sub_(log_q)))
    means = torch.cat(found).double().view(windows, positions).mean(1)
    mean, error = float(means.mean()), float(means.std()) / math.sqrt(windows)
    if not math.isfinite(mean):
        raise TrialError("nan", f"the divergence from the dense model is {mean}", PHASE)
    return mean, error
