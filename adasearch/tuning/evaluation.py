"""From log-likelihoods to scores with standard errors: lm-eval's `acc` and `acc_norm`, our `margin`; and perplexity.

Letters: n items of a task, C choices of an item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from adasearch.config import TaskScore
from adasearch.errors import DataError, TrialError
from adasearch.tuning.decoder import last_hidden
from adasearch.tuning.items import Item
from adasearch.tuning.scoring import target_logprobs

Metric = Literal["margin", "acc", "acc_norm"]
_CPU_TOKENS, _DEVICE_TOKENS = 4_096, 32_768


def _margin(item: Item, logliks: np.ndarray) -> float:
    """Return (p - 1/C) / (1 - 1/C), with p the softmax over choices of the log-likelihood per character.

    Where a task reports no `acc_norm`, as with "yes" and "no" or one ending of several contexts, lengths mean nothing
    and the log-likelihoods count as they are.
    """
    rates = logliks / np.maximum(item.lengths, 1) if item.acc_norm else logliks
    weights = np.exp(rates - rates.max())
    chance = 1.0 / len(logliks)
    return float((weights[item.gold] / weights.sum() - chance) / (1.0 - chance))


def item_values(items: Sequence[Item], logliks: Sequence[np.ndarray], metric: Metric) -> np.ndarray:
    """Return the value of every item (float64 n-vector), higher is better: what racing compares, item by item.

    `acc_norm` divides by the characters of a choice as lm-eval does; where a task does not report it, it is `acc`.
    Ties go to the first choice, as in lm-eval.

    Args:
        items: of one task or of several.
        logliks: for each item the log-likelihoods of its choices (C-vectors).
        metric: which value.
    """
    if metric == "margin":
        return np.array([_margin(item, values) for item, values in zip(items, logliks, strict=True)])
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
    found = {metric: mean_and_error(item_values(items, logliks, metric)) for metric in ("margin", "acc", "acc_norm")}
    normalised = found["acc_norm"] if items[0].acc_norm else (None, None)
    return TaskScore(
        task=items[0].task,
        n=len(items),
        acc=found["acc"][0],
        acc_stderr=found["acc"][1],
        acc_norm=normalised[0],
        acc_norm_stderr=normalised[1],
        margin=found["margin"][0],
        margin_stderr=found["margin"][1],
    )


def objective(scores: Sequence[TaskScore], metric: Metric) -> tuple[float, float]:
    """Return the mean of `metric` over tasks and its standard error; `acc` stands in where a task has no `acc_norm`.

    The error is that of a mean of independent estimates, sqrt(sum of squares) / number of tasks.
    """
    pairs = [
        (score.acc, score.acc_stderr)
        if metric == "acc_norm" and score.acc_norm is None
        else (getattr(score, metric), getattr(score, f"{metric}_stderr"))
        for score in scores
    ]
    return sum(value for value, _ in pairs) / len(pairs), math.hypot(*(error for _, error in pairs)) / len(pairs)


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
