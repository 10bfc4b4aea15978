"""PrunePEFT: adapters everywhere first, of which whole ones go while they are trained (arXiv 2506.07587).

Which modules need an adapter is decided by what their adapters become: the least important leave, a few at a time, and
what stays is trained on. Shape letters: M outputs and K inputs of a projection, R rank of its update b a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adasearch.documents import Count, Fraction, Positive, value
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.decoder import Update, Updates, without_dropout
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.recovery._adapters import Paced, PacedOptions, check, factors, projections, tune
from adasearch.tuning.training import Adapters, Batch, next_token_loss


@value
class PrunePeftOptions(PacedOptions):
    """Settings of PrunePEFT, beside those of all adapters.

    Args:
        alpha: an update of rank R counts alpha / R times.
        keep: share of the adapters that stay, at least one.
        metric: what tells an adapter's importance, one of `METRICS`, or ``hybrid``: in each block of layers the one
            that was most often right, see `Thinning`.
        blocks: blocks of layers, for ``hybrid``.
        rounds: steps, the last before `begin`, in which the metrics are tried, for ``hybrid``; each costs a forward for
            every block and adapter that a metric would take from it.
    """

    alpha: Positive = 16.0
    keep: Fraction = 0.5
    metric: Literal["magnitude", "zeros", "gradient", "snip", "hybrid"] = "snip"
    blocks: Count = 4
    rounds: Count = 2


Factor = tuple[Tensor, Tensor]
"""A factor of an update and its gradient, float32, of equal shape."""


def magnitude(pair: Sequence[Factor]) -> float:
    """Return the root of the mean square of the elements of b a, from the Gram matrices of its factors a and b.

    The paper takes the mean of |w| over an adapter, which for an update with random a and first b = 0 says how a was
    drawn; the product says what the adapter does.
    """
    (a, _), (b, _) = pair
    square = float(((a @ a.T) * (b.T @ b)).sum()) / (a.shape[1] * b.shape[0])
    return float(np.sqrt(max(0.0, square)))


def zeros(pair: Sequence[Factor]) -> float:
    """Return the share of the elements of b that are at least a tenth of their mean size: few where b is nearly 0."""
    _, (b, _) = pair
    sizes = b.abs()
    return float((sizes > 0.1 * sizes.mean()).float().mean())


def gradient(pair: Sequence[Factor]) -> float:
    """Return the mean of |dL/dw| over both factors."""
    return sum(float(grad.abs().sum()) for _, grad in pair) / sum(grad.numel() for _, grad in pair)


def snip(pair: Sequence[Factor]) -> float:
    """Return the mean of |w dL/dw| over both factors (SNIP, Lee et al., ICLR 2019)."""
    return sum(float((w * grad).abs().sum()) for w, grad in pair) / sum(w.numel() for w, _ in pair)


METRICS: dict[str, Callable[[Sequence[Factor]], float]] = {
    "magnitude": magnitude,
    "zeros": zeros,
    "gradient": gradient,
    "snip": snip,
}
"""Importance of an adapter from (a, its gradient) and (b, its gradient); the least goes first."""


def places(numbers: Sequence[float]) -> list[float]:
    """Return the place of each number among them, from 0 for the least to below 1; of equal ones the first is less."""
    order = sorted(range(len(numbers)), key=lambda i: numbers[i])
    found = [0.0] * len(numbers)
    for place, i in enumerate(order):
        found[i] = place / len(numbers)
    return found


class Thinning(Paced):
    """Updates of which whole ones leave between two points of a run, the least important of all that are left.

    With ``hybrid`` the modules are split into blocks of neighbours. In some steps before the first leaves, every metric
    names the adapter of each block that it would take; the metrics whose choice costs least on the step's batch get a
    vote. The one with most votes of a block, of equal ones the first of `METRICS`, speaks for it from then on, and
    places within a block are compared over blocks.

    Args:
        model: that is trained.
        modules: that get an update, in the order of the layers.
        options: of the run.
        steps: of the run.
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Linear], options: PrunePeftOptions, steps: int) -> None:
        scale = options.alpha / options.rank
        updates: dict[nn.Module, Update] = {
            m: Update(*factors(m, options.rank), scale, options.dropout) for m in modules
        }
        super().__init__(updates, options, steps)
        self._model, self._all = model, updates
        self._metric, self._rounds = options.metric, options.rounds
        self.totals = len(modules), max(1, round(options.keep * len(modules)))
        number = min(options.blocks, len(modules)) if options.metric == "hybrid" else 1
        bounds = [round(i * len(modules) / number) for i in range(number + 1)]
        self._blocks = [list(modules[i:j]) for i, j in pairwise(bounds)]
        self.votes = [dict.fromkeys(METRICS, 0) for _ in self._blocks]

    def state(self) -> dict[str, Any]:
        """Return which adapters are left, by their number, and the votes."""
        left = [number for number, module in enumerate(self._all) if module in self._updates]
        return {"left": left, "votes": self.votes}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        left = set(state["left"])
        self._updates = {module: u for number, (module, u) in enumerate(self._all.items()) if number in left}
        self.votes = [dict(votes) for votes in state["votes"]]

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:
        """Let the metrics vote, or take adapters away, as many as the schedule says."""
        before = int(self._options.begin * self._steps)
        if self._metric == "hybrid" and before - self._rounds < step <= before:
            self._vote(batch, masters)
        left = self._options.left(step, self._steps, self.totals, power=1)
        if left is None or left >= len(self._updates):
            return
        scores = self._scores(masters)
        staying = sorted(self._updates, key=scores.__getitem__, reverse=True)[:left]
        self._updates = {module: update for module, update in self._updates.items() if module in set(staying)}

    def _pair(self, module: nn.Module, masters: Masters) -> list[Factor]:
        update = self._updates[module]
        return [(masters.copy(factor), masters.gradient(factor)) for factor in (update.a, update.b)]

    def _scores(self, masters: Masters) -> dict[nn.Module, float]:
        """Return the importance of every adapter that is left."""
        found: dict[nn.Module, float] = {}
        for block, votes in zip(self._blocks, self.votes, strict=True):
            left = [module for module in block if module in self._updates]
            hybrid = self._metric == "hybrid"
            metric = METRICS[max(votes, key=votes.__getitem__) if hybrid else self._metric]
            scores = [metric(self._pair(module, masters)) for module in left]
            found.update(zip(left, places(scores) if hybrid else scores, strict=True))
        return found

    @torch.no_grad()
    def _vote(self, batch: Batch, masters: Masters) -> None:
        whole = without_dropout(self._updates)
        for block, votes in zip(self._blocks, self.votes, strict=True):
            pairs = {module: self._pair(module, masters) for module in block}
            named = {name: min(pairs, key=_by(metric, pairs)) for name, metric in METRICS.items()}
            loss = {module: _loss_without(self._model, batch, whole, module) for module in set(named.values())}
            least = min(loss.values())
            for name, module in named.items():
                votes[name] += loss[module] == least


def _by(
    metric: Callable[[Sequence[Factor]], float], pairs: Mapping[nn.Linear, Sequence[Factor]]
) -> Callable[[nn.Linear], float]:
    return lambda module: metric(pairs[module])


def _loss_without(model: nn.Module, batch: Batch, updates: Updates, module: nn.Module) -> float:
    """Return the loss on a batch when the update of one module is left out."""
    rest = {other: update for other, update in updates.items() if other is not module}
    return float(next_token_loss(model, batch.ids, updates=rest, marks=batch.marks)[1])


@RECOVERY.register(options=PrunePeftOptions, check=check, adapters=True)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: PrunePeftOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train adapters, let the least important leave, merge those that stay; the signature is that of the set.

    The paper trains what stays once more from the start; here it goes on, within the same tokens.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    modules = projections(model, structure, options)

    def make(steps: int) -> Adapters:
        return Thinning(model, list(modules.values()), options, steps)

    return tune(model, make, tokens, options, context)
