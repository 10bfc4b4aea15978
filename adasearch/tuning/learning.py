"""Training in which a `Learner` learns which units stay: the bridge from pruning to the training loop."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from adasearch.pruning.learning import Learner
from adasearch.pruning.structure import ModelStructure
from adasearch.tuning.decoder import Update, Updates, unchanged
from adasearch.tuning.loop import train
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.recovery._adapters import AdapterOptions, factors, merge, projections
from adasearch.tuning.training import Adapters, Batch, TrainingConfig, seeded


class _Riding(Adapters):
    """Updates of weights, and gates on what output projections read, as a learner says.

    Args:
        model: dense.
        structure: its groups.
        updates: of its projections.
        learner: says the gates.
        steps: of the run.
    """

    def __init__(
        self, model: nn.Module, structure: ModelStructure, updates: Updates, learner: Learner, steps: int
    ) -> None:
        super().__init__(updates)
        self._learner, self._done, self._steps = learner, 0, steps
        self._outputs = {g.name: (cast("nn.Linear", model.get_submodule(g.output)), g.output_block)
                         for g in structure.groups}  # fmt: skip
        self._named = {name: updates[module] for name, module in model.named_modules() if module in updates}

    def parameters(self) -> list[nn.Parameter]:
        """Return the factors of the updates, and what the learner trains."""
        return [*super().parameters(), *self._learner.parameters()]

    def updates(self) -> Updates:
        """Return the updates with the learner's factors as gates, each as often as its unit has features."""
        found = dict(super().updates())
        for name, factor in self._learner.gates(self._done / self._steps).items():
            module, block = self._outputs[name]
            update = found.get(module) or unchanged(module)
            found[module] = update._replace(gate=factor.repeat_interleave(block))
        return found

    def penalty(self) -> Tensor | None:
        """Return the learner's."""
        return self._learner.penalty()

    def graded(self) -> None:
        """Show the learner the gradients."""
        self._learner.graded(self._named)

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:  # noqa: ARG002 - of the signature
        """Note how far the run is."""
        self._done = step


def _own_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return all parameters of a model, copies of what they were; tied ones stay tied."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return list(model.requires_grad_(requires_grad=True).parameters())


def fresh_updates(
    model: nn.Module, structure: ModelStructure, options: Any, section: str, targets: str | tuple[str, ...] = "all"
) -> dict[nn.Module, Update]:
    """Return a low-rank update for projections of a model, and freeze it; call it inside `seeded`.

    Args:
        model: dense.
        structure: its groups.
        options: with `rank`, `alpha` and `dropout`, of a `section` of the trial.
        section: named where the rank is refused.
        targets: which projections, see `recovery._adapters.Targets`.

    Raises:
        TrialError: the rank is above the smaller side of a projection (kind ``config``).
    """
    asked = AdapterOptions(rank=options.rank, targets=targets)
    modules = projections(model, structure, asked, section, dense=True).values()
    scale = options.alpha / options.rank
    return {module: Update(*factors(module, options.rank), scale, options.dropout) for module in modules}


@torch.no_grad()
def fold(model: nn.Module, updates: Updates) -> None:
    """Make updates part of weights, which become new tensors, and freeze the model."""
    for module, update in updates.items():
        module.weight = nn.Parameter(cast("Tensor", module.weight).detach().clone(), requires_grad=False)
        merge(module, update)
    model.requires_grad_(requires_grad=False)


def learn(
    model: nn.Module,
    structure: ModelStructure,
    tokens: Tensor,
    options: Any,
    learner: Learner,
    context: RecoveryContext,
) -> RecoveryReport:
    """Train on the stream with the learner's gates, and make them part of the weights that they count for.

    What is tuned beside them the option `rank` says: without such an option nothing; 0 tunes all weights; above,
    updates of that rank are trained and merged. Weights that change are new tensors of the model: those it was made
    over are only read.

    Args:
        model: dense, frozen, in the layout of transformers.
        structure: its groups.
        tokens: 1-D stream of token ids.
        options: `LearningOptions` of a schedule.
        learner: says the gates.
        context: seed, device, progress and the teacher.

    Raises:
        TrialError: a loss that is not finite (kind ``nan``); a stream that is too short, or a teacher that is missing
            (kind ``config``).
    """
    run, rank = TrainingConfig.of(options), getattr(options, "rank", None)
    with seeded(context), torch.enable_grad():
        updates = fresh_updates(model, structure, options, "schedule") if rank else {}
        weights = _own_weights(model) if rank == 0 else []
        riding = _Riding(model, structure, updates, learner, run.steps)
        masters = Masters([*weights, *riding.parameters()], run)
        report = train(model, masters, tokens, run, context, riding)
    if rank:
        masters.restore_precision()
    fold(model, riding.updates())
    return report
