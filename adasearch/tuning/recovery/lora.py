"""LoRA: low-rank updates beside frozen weights, merged at the end (Hu et al., ICLR 2022); rsLoRA and DoRA.

Shape letters: M outputs and K inputs of a projection, R rank of its update b a.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adasearch.documents import Positive, value
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.decoder import Update, Updates
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.recovery._adapters import AdapterOptions, check, factors, projections, tune, widest
from adasearch.tuning.training import Adapters


@value
class LoraOptions(AdapterOptions):
    """Settings of LoRA, beside those of all adapters.

    Args:
        alpha: numerator of an update's scale.
        scaling: an update of rank R counts alpha / R times (``standard``), or alpha / sqrt(R) times (``rslora``,
            Kalajdzievski 2023, arXiv 2312.03732, definition 3.1).
        dora: give every output row a magnitude of its own, see `Dora`.
        ranks: ``uniform``, the same rank everywhere; ``by_cut``, more where more was cut at the same sum of ranks, see
            `ranks_by_cut`. Each update is scaled by its own rank.
    """

    alpha: Positive = 16.0
    scaling: Literal["standard", "rslora"] = "standard"
    dora: bool = False
    ranks: Literal["uniform", "by_cut"] = "uniform"


def apportioned(weights: Sequence[float], total: int, most: Sequence[int]) -> list[int]:
    """Return whole numbers, as near to proportional to `weights` as they can be, of the sum `total`.

    Each is at least 1 and at most what `most` says. After the first of each, every further one goes where the weight
    over twice the number so far plus one is greatest (the method of Sainte-Laguë, which favours neither large nor small
    weights); of equal ones to the first.

    Args:
        weights: above 0.
        total: from ``len(weights)`` to ``sum(most)``.
        most: at least 1 each.
    """
    numbers = [1] * len(weights)
    queue = [(-weight / 3, i) for i, weight in enumerate(weights) if most[i] > 1]
    heapq.heapify(queue)
    for _ in range(total - len(weights)):
        _, i = heapq.heappop(queue)
        numbers[i] += 1
        if numbers[i] < most[i]:
            heapq.heappush(queue, (-weights[i] / (2 * numbers[i] + 1), i))
    return numbers


def cut_shares(model: Any, structure: ModelStructure) -> dict[str, float]:
    """Return the fraction of its units that each group of a model lost in the cut, by the group's name."""
    left = {g.name: model.get_submodule(g.output).in_features for g in structure.groups}
    return {g.name: 1.0 - left[g.name] / (g.units * g.output_block) for g in structure.groups}


def ranks_by_cut(modules: Mapping[str, nn.Linear], cut: Mapping[str, float], rank: int) -> list[int]:
    """Return a rank for every module: half of all ranks evenly, half in proportion to what was cut of the sublayer.

    With c the fraction that was removed of a module's sublayer and c' its mean over the modules, the rank is
    ``rank (1 + c / c') / 2``, made whole by `apportioned`, with the sum ``rank * len(modules)`` where there is
    room for it: from half of `rank` where nothing went. Where nothing went anywhere all have `rank`. The rule is ours.

    Args:
        modules: by path.
        cut: fraction that was removed by name of sublayer; those left out lost nothing.
        rank: mean over the modules.
    """
    lost = [cut.get(name.rpartition(".")[0], 0.0) for name in modules]
    mean = sum(lost) / len(lost)
    weights = [1.0 + share / mean if mean > 0 else 1.0 for share in lost]
    most = [widest(m) for m in modules.values()]
    return apportioned(weights, min(rank * len(modules), sum(most)), most)


class Dora(Adapters):
    """Weights taken apart into the magnitude of each output row and its direction (Liu et al., ICML 2024, equation 5).

    W' = m (W + s b a) / |W + s b a| with the norm of each row and m a trained vector (M), at first |W|. The norm counts
    as a constant in the backward pass (section 4.3). Dropout touches the update alone.
    """

    def __init__(self, updates: Updates) -> None:
        super().__init__(updates)
        self._squares = {module: _squares(module) for module in updates}
        # float32 whatever the model: a magnitude rounded to bfloat16 would change every weight from the start
        self._magnitudes = {module: nn.Parameter(squares.sqrt()) for module, squares in self._squares.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Return factors and magnitudes."""
        return [*super().parameters(), *self._magnitudes.values()]

    def updates(self) -> Updates:
        """Return the updates with their gain m / |W + s b a|."""
        found = {}
        for module, update in super().updates().items():
            norm = row_norms(module, self._squares[module], update)
            found[module] = update._replace(gain=(self._magnitudes[module] / norm).to(update.a.dtype))
        return found


@torch.no_grad()
def _squares(module: Any) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(module.weight, dim=1, dtype=torch.float32)
    return norms.square_()


@torch.no_grad()
def row_norms(module: Any, squares: Tensor, update: Update) -> Tensor:
    """Return |w + s b a| of each row of a weight (M, float32) without making the sum.

    Its square is |w|^2 + 2 s b (a w^T) + s^2 b (a a^T) b^T, which costs a product of rank R.

    Args:
        module: linear, with the weight M × K.
        squares: |w|^2 of each row, M.
        update: of the module.
    """
    cross = (module.weight.to(update.a.dtype) @ update.a.T).float()
    a, b = update.a.float(), update.b.float()
    inner = cross.mul_(2.0).addmm_(b, a @ a.T, alpha=update.scale)
    found: Tensor = squares + update.scale * torch.linalg.vecdot(b, inner)
    return found.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


def _scale(options: LoraOptions, rank: int) -> float:
    return options.alpha / (rank if options.scaling == "standard" else math.sqrt(rank))


@RECOVERY.register(options=LoraOptions, check=check, adapters=True)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: LoraOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train updates on the stream and merge them; the signature is that of the set, the run that of `tune`.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    modules = projections(model, structure, options)
    ranks = [min(options.rank, widest(m)) for m in modules.values()]
    if options.ranks == "by_cut":
        ranks = ranks_by_cut(modules, cut_shares(model, structure), options.rank)

    def make(_steps: int) -> Adapters:
        updates: dict[nn.Module, Update] = {
            module: Update(*factors(module, rank), _scale(options, rank), options.dropout)
            for module, rank in zip(modules.values(), ranks, strict=True)
        }
        return Dora(updates) if options.dora else Adapters(updates)

    return tune(model, make, tokens, options, context)
