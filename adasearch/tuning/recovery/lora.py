"""LoRA: low-rank updates beside frozen weights, merged at the end (Hu et al., ICLR 2022)."""

from __future__ import annotations

import math
from typing import Annotated, Literal, cast

import pydantic
import torch
from torch import Tensor, nn

from adasearch.documents import Count, NonNegative, Positive, Share, value
from adasearch.errors import TrialError
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.decoder import Update
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport, SequenceLength
from adasearch.tuning.training import PHASE, Adapters, Masters, TrainingConfig, seeded, train


@value
class LoraOptions:
    """Settings of LoRA.

    Args:
        rank: of each update B A.
        alpha: the update counts `alpha` / `rank` times.
        dropout: share of an adapter's inputs that is dropped while training.
        targets: which projections get an adapter.
        tokens: tokens to train on.
        length: tokens of a sequence.
        batch: sequences of a step.
        lr: greatest learning rate; short runs want a far greater one than the 1e-4 of runs over millions of tokens.
        warmup: share of the steps with a rising rate.
        grad_clip: greatest gradient norm.
        distill: weight of KL(dense || smaller) beside the next-token loss; costs one dense forward per step.
        corpus: text to train on; None takes the corpus of the calibration.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    targets: Literal["all", "attention", "mlp"] = "all"
    tokens: Count = 16384
    length: SequenceLength = 128
    batch: Count = 4
    lr: Positive = 1e-3
    warmup: Share = 0.1
    grad_clip: Positive = 1.0
    distill: NonNegative = 0.0
    corpus: str | None = None


def targeted(model: nn.Module, structure: ModelStructure, targets: str) -> list[nn.Linear]:
    """Return the linear modules that get an update."""
    found = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        kind = "mlp" if parent.endswith("mlp") else "attention"
        if isinstance(module, nn.Linear) and last in structure.lora_targets and targets in {"all", kind}:
            found.append(module)
    if not found:
        raise TrialError("config", f"targets {targets} must name a projection, the model has none of them", PHASE)
    return found


def fresh(module: nn.Linear, options: LoraOptions) -> Update:
    """Return an update that changes nothing yet: A drawn as by Kaiming for a leaky ReLU of slope sqrt(5), B zero."""
    weight = module.weight
    a = torch.empty(options.rank, module.in_features, device=weight.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    b = torch.zeros(module.out_features, options.rank, device=weight.device)
    first, second = (nn.Parameter(factor.to(weight.dtype)) for factor in (a, b))
    return Update(first, second, options.alpha / options.rank, options.dropout)


@torch.no_grad()
def merge(module: nn.Linear, update: Update) -> None:
    """Add an update to a weight, in float32, and round once."""
    sum_ = module.weight.float().addmm_(update.b.float(), update.a.float(), alpha=update.scale)
    module.weight.copy_(sum_)


@RECOVERY.register(options=LoraOptions)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: LoraOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train updates on the stream and merge them; the signature is that of the set.

    Updates are computed in the dtype of the model and kept in float32 by the optimizer; the merge takes the float32
    values, so that a bfloat16 weight is rounded once.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    run = TrainingConfig.of(options)
    modules = targeted(model, structure, options.targets)
    model.requires_grad_(False)  # noqa: FBT003
    with seeded(context):
        updates: dict[nn.Module, Update] = {module: fresh(module, options) for module in modules}
        factors = [factor for update in updates.values() for factor in (update.a, update.b)]
        masters = Masters(cast("list[nn.Parameter]", factors), run)
        report = train(model, masters, tokens, run, context, Adapters(updates))
    masters.restore_precision()
    for module in modules:
        merge(module, updates[module])
    return report
