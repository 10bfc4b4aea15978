"""Hybrid sparsification modules: which dimensions of the residual stream stay, learnt in a tune and folded away (PAT).

Shape letters: D hidden size, R inner size of a module, K inputs of a projection.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from adasearch.errors import TrialError
from adasearch.pruning.hidden import highest
from adasearch.pruning.structure import ModelStructure
from adasearch.tuning.decoder import Update, Updates, unchanged
from adasearch.tuning.learning import fold, fresh_updates
from adasearch.tuning.loop import train
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.training import PHASE, Adapters, Batch, TrainingConfig, seeded

_READS = ("q", "k", "v", "gate", "up")
_COUNT = 10.0
"""Weight of the penalty on the number of open dimensions, as published."""


class Goal(NamedTuple):
    """What is to be learnt.

    Args:
        start: first mask parameters m (D).
        number: of dimensions that stay.
        options: `hidden.pat.PatOptions`.
    """

    start: Tensor
    number: int
    options: Any


class Sparsified(Adapters):
    """Modules behind every projection that writes to the residual stream, with one mask M for all of them.

    A module makes y = s M (x + U E x) of the output x = W z, with E (R × D), U (D × R) and s (D) of its own, as in PAT
    (arXiv 2408.14721, section 3.2). That is a low-rank update of W, with the factors U and E W, and a gain s M: it
    costs what an adapter costs, and folds into W. The embedding is multiplied by M alone, which leaves it tied.

    Args:
        model: frozen.
        structure: says what writes to the residual stream.
        updates: low-rank updates of projections that read it.
        goal: what is to be learnt.
        steps: of the run.
    """

    def __init__(self, model: Any, structure: ModelStructure, updates: Updates, goal: Goal, steps: int) -> None:
        super().__init__(updates)
        options, self._goal = goal.options, goal
        self._done, self._steps = 0, steps
        self._embedding = model.get_input_embeddings()
        # AdamW moves what it trains by the rate whatever the size of the gradient: m is `ratio` times as fast
        self._ratio: float = options.mask_lr / options.lr
        self._z: nn.Parameter = nn.Parameter(goal.start.float().to(self._embedding.weight.device) / self._ratio)
        self._modules = {}
        for group in structure.groups:
            module = model.get_submodule(group.output)
            size, like = module.out_features, module.weight
            inner = torch.empty(options.inner, size, device=like.device)
            nn.init.kaiming_uniform_(inner, a=math.sqrt(5))
            outer, scale = like.new_zeros(size, options.inner), torch.ones(size, device=like.device)
            self._modules[module] = (nn.Parameter(inner), nn.Parameter(outer.float()), nn.Parameter(scale))

    @property
    def scores(self) -> Tensor:
        """Return m (D, float32)."""
        return self._z.detach() * self._ratio

    @property
    def _frozen(self) -> bool:
        return bool(self._done >= self._goal.options.frozen * self._steps)

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors of the updates, what the modules hold, and the mask's parameters."""
        return [*super().parameters(), *(part for parts in self._modules.values() for part in parts), self._z]

    def mask(self) -> Tensor:
        """Return M (D): 1 / (1 + exp(-tau m)) + max(1/2 - t / T, 0), tau = 1 / (1 - log t / log T), after t of T steps.

        Once m is frozen it is 1 for the dimensions that stay and 0 for the others: what is trained from there on is the
        model that is left.
        """
        if self._frozen:
            kept = torch.tensor(highest(self.scores, self._goal.number), device=self._z.device)
            return torch.zeros_like(self._z).index_fill(0, kept, 1.0).detach()
        tau = 1.0 / (1.0 - math.log(max(1, self._done)) / math.log(max(2, self._steps)))
        return torch.sigmoid(tau * self._ratio * self._z) + max(0.5 - self._done / self._steps, 0.0)

    def updates(self) -> Updates:
        """Return the updates, the modules as updates, and the mask as the embedding's gate."""
        found, mask = dict(super().updates()), self.mask()
        for module, (inner, outer, scale) in self._modules.items():
            weight: Any = module.weight
            a, b = inner.to(weight.dtype) @ weight, outer.to(weight.dtype)
            found[module] = Update(a, b, 1.0, gain=(scale * mask).to(weight.dtype))
        found[self._embedding] = unchanged(self._embedding)._replace(gate=mask)
        return found

    def penalty(self) -> Tensor:
        """Return the identity loss, and until m is frozen what pulls the mask to the number and apart.

        The identity loss is the mean over modules of the mean square of E E^T - 1. The rest is
        10 |n - N| / N + mean (m+ - 1/2)^2 + mean (m- + 1/2)^2, with n the number of m that are not negative, through
        which the gradient goes as through a sigmoid, N that which shall stay, m+ those and m- the others.
        """
        identity: Tensor = torch.zeros((), device=self._z.device)
        for inner, _, _ in self._modules.values():
            gap = inner @ inner.T - torch.eye(len(inner), device=inner.device)
            identity = identity + gap.square().mean() / len(self._modules)
        if self._frozen:
            return identity
        m, number = self._z * self._ratio, self._goal.number
        opened, soft = (m >= 0).float(), torch.sigmoid(m)
        count = (opened + soft - soft.detach()).sum()
        up = (opened * (m - 0.5).square()).sum() / opened.sum().clamp_min(1)
        down = ((1 - opened) * (m + 0.5).square()).sum() / (1 - opened).sum().clamp_min(1)
        return identity + _COUNT * (count - number).abs() / number + up + down

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:  # noqa: ARG002 - of the signature
        """Note how far the run is."""
        self._done = step


def sparsify(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, goal: Goal, context: RecoveryContext
) -> Tensor:
    """Train modules and updates, fold them into the weights, and return the learnt m (D, float32, on the CPU).

    The model that is left adds nothing to the dimensions of the least m: without them it computes the same, as the
    weights of its norms count the mean over fewer. Weights that change are new tensors.

    Args:
        model: dense, in the layout of transformers.
        structure: its groups.
        tokens: 1-D stream of token ids.
        goal: what is to be learnt.
        context: seed, device, progress and the teacher.

    Raises:
        TrialError: a loss that is not finite (kind ``nan``); biases that write to the residual stream, a stream that is
            too short, or a teacher that is missing (kind ``config``).
    """
    biased = [name for g in structure.groups if (name := g.output) and _module(model, name).bias is not None]
    if biased:
        raise TrialError("config", f"hidden.pat needs output projections without biases, {biased[0]} has one", PHASE)
    run = TrainingConfig.of(goal.options)
    with seeded(context), torch.enable_grad():
        updates = fresh_updates(model, structure, goal.options, "hidden", _READS)
        riding = Sparsified(model, structure, updates, goal, run.steps)
        masters = Masters(riding.parameters(), run)
        train(model, masters, tokens, run, context, riding)
    masters.restore_precision()
    fold(model, riding.updates())
    with torch.no_grad():
        for piece in structure.stream:
            module = _module(model, piece.parameter.rpartition(".")[0])
            if module.weight.dim() == 1:  # a norm, whose mean goes over all dimensions
                wider = module.weight.float() * math.sqrt(len(goal.start) / goal.number)
                module.weight = nn.Parameter(wider.to(module.weight.dtype), requires_grad=False)
    return riding.scores.cpu()


def _module(model: nn.Module, name: str) -> nn.Linear:
    return cast("nn.Linear", model.get_submodule(name))
