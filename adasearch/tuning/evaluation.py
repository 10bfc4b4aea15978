"""From log-likelihoods to scores with standard errors: lm-eval's `acc`, `acc_norm`; `margin`, `log_score`; perplexity.

Letters: n items of a task, C choices of an item, at least 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch

from adasearch.config import TaskScore
from adasearch.errors import DataError, TrialError
from adasearch.sections import Metric
from adasearch.tuning.decoder import last_hidden
from adasearch.tuning.items import Item
from adasearch.tuning.scoring import target_logprobs

_CPU_TOKENS, _DEVICE_TOKENS = 4_096, 32_768


def _log_probability(item: Item, logliks: np.ndarray) -> float:
    """Return log p (nats) of the right choice, p the softmax over choices of the log-likelihood per character.

    Where a task reports no `acc_norm`, as with "yes" and "no" or one ending of several contexts, lengths mean nothing
    and the log-likelihoods count as they are.
    """
    rates = logliks / np.maximum(item.lengths, 1) if item.acc_norm else logliks
    below = rates - rates.max()  # so that no exponential overflows, and their sum is 1 at least
    return float(below[item.gold] - np.log(np.exp(below).sum()))


def _margin(item: Item, logliks: np.ndarray) -> float:
    """Return (p - 1/C) / (1 - 1/C), p the probability of the right choice: 0 at chance, 1 at certainty."""
    chance = 1.0 / len(logliks)
    return (math.exp(_log_probability(item, logliks)) - chance) / (1.0 - chance)


def _log_score(item: Item, logliks: np.ndarray) -> float:
    """Return log(C p) / log C, p the probability of the right choice: 0 at chance, 1 at certainty, no lower bound.

    The logarithmic score log p (Good 1952, Rational Decisions, J. R. Stat. Soc. B 14, 107) as a skill score, its gain
    over that of chance, log 1/C, in units of what certainty gains: (log p + log C) / (0 + log C). In words, the
    information that the model has of the right choice, as a share of all that there is to have.
    """
    return 1.0 + _log_probability(item, logliks) / math.log(len(logliks))


_SMOOTH = {"margin": _margin, "log_score": _log_score}


def item_values(items: Sequence[Item], logliks: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    """Return the value of every item (float64 n-vector), higher is better: what racing compares, item by item.

    `acc_norm` divides by the characters of a choice as lm-eval does; where a task does not report it, it is `acc`.
    Ties go to the first choice, as in lm-eval.

    Args:
        items: of one task or of several.
        logliks: for each item the log-likelihoods of its choices (C-vectors).
        metric: which value.
    """
    smooth = _SMOOTH.get(metric)
    if smooth is not None:
        return np.array([smooth(item, values) for item, values in zip(items, logliks, strict=True)])
    right = []
    for item, values in zip(items, logliks, strict=True):
        if metric == "acc_norm" and item.acc_norm:
            values = values / np.array(item.lengths, dtype=np.float64)
        right.append(float(np.argmax(values) == item.gold))
    return np.array(right)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of a vector and its standard error, sample deviation / sqrt(n); 0 for a single value."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error


def task_score(items: Sequence[Item], logliks: Sequence[np.ndarray]) -> TaskScore:
    """Return the scores of one task, each with its standard error over items.

    Args:
        items: all of one task, at least one.
        logliks: for each item the log-likelihoods of its choices (C-vectors).
    """
    assert items, "a score needs at least one item"
    figures: dict[str, Any] = {"acc_norm": None, "acc_norm_stderr": None}
    for metric in get_args(Metric):
        if metric != "acc_norm" or items[0].acc_norm:
            figures[metric], figures[f"{metric}_stderr"] = mean_and_error(item_values(items, logliks, metric))
    return TaskScore(task=items[0].task, n=len(items), **figures)


@torch.inference_mode()
def total_nats(model: Any, windows: torch.Tensor, scored: torch.Tensor, token_budget: int | None = None) -> float:
    """Return the negative log-likelihood (nats) of the scored tokens of windows that each stand alone.

    Args:
        model: a causal language model with the modules `model` and `lm_head`, in eval mode.
        windows: N × W token ids; what fills up a short window stands at its end.
        scored: N × W, true for the tokens that are predicted, which the first of a window never is.
        token_budget: tokens of a batch; None suits the model's device.

    Raises:
        TrialError: the model gives values that are not finite.
    """
    count, window = windows.shape
    device = model.lm_head.weight.device
    budget = token_budget or (_CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS)
    total = 0.0
    step = max(1, budget // window)
    for begin in range(0, count, step):
        batch = windows[begin : begin + step].to(device)
        states = last_hidden(model, batch)[:, :-1].flatten(0, 1)
        lines = scored[begin : begin + step, 1:].flatten().nonzero().flatten().to(device)
        values = target_logprobs(model.lm_head, states, lines, batch[:, 1:].flatten()[lines])
        total -= float(values.double().sum())
    if not math.isfinite(total):
        raise TrialError("nan", f"the log-likelihood of {count} windows of {window} tokens is not finite", "evaluate")
    return total


def perplexity_of(nats: float, tokens: int) -> float:
    """Return exp(`nats` / `tokens`), the perplexity per token of text that costs `nats`; finite."""
    return math.exp(min(nats / tokens, 700.0))  # beyond that a float overflows


def perplexity(model: Any, tokens: torch.Tensor, window: int, token_budget: int | None = None) -> float:
    """Return exp of the mean negative log-likelihood over non-overlapping windows; the last, partial one is left out.

    Every window stands alone: its first token is given, the other `window - 1` are predicted.

    Args:
        model: a causal language model with the modules `model` and `lm_head`, in eval mode.
        tokens: T-vector of token ids, contiguous text.
        window: tokens of a window, at least 2; published tables use 128 or 2048 and are not comparable.
        token_budget: tokens of a batch; None suits the model's device.

    Raises:
        DataError: the text is shorter than a window.
        TrialError: the model gives values that are not finite.
    """
    count = len(tokens) // window
    if window < 2 or count < 1:
        raise DataError(
            f"perplexity needs a window of 2 tokens or more and as much text, given {window} and {len(tokens)}"
        )
    windows = tokens[: count * window].view(count, window)
    scored = torch.ones_like(windows, dtype=torch.bool)
    return perplexity_of(total_nats(model, windows, scored, token_budget), count * (window - 1))
