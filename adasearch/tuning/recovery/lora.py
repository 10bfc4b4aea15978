"""LoRA: low-rank updates beside frozen weights, merged at the end (Hu et al., ICLR 2022)."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from torch import Tensor, nn

from adasearch.documents import Count, NonNegative, Positive, Share, value
from adasearch.errors import TrialError
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport, SequenceLength
from adasearch.tuning.training import PHASE, Masters, TrainingConfig, seeded, train


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


def _target_modules(model: nn.Module, structure: ModelStructure, targets: str) -> list[str]:
    """Return the full names of the linear modules that get an adapter."""
    names = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        kind = "mlp" if parent.endswith("mlp") else "attention"
        if isinstance(module, nn.Linear) and last in structure.lora_targets and targets in {"all", kind}:
            names.append(name)
    if not names:
        raise TrialError("config", f"targets {targets} must name a projection, the model has none of them", PHASE)
    return names


@RECOVERY.register(options=LoraOptions)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: LoraOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train adapters on the stream and merge them; the signature is that of the set.

    Adapters are computed in the dtype of the model and kept in float32 by the optimizer; the merge takes the float32
    values, so that a bfloat16 weight is rounded once.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    import peft  # here, so that a study is read and validated without it

    run = TrainingConfig.of(options)
    names = _target_modules(model, structure, options.targets)
    adapters = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=options.dropout,
        target_modules=names,
    )
    model.requires_grad_(False)  # noqa: FBT003
    with seeded(context):
        tuner = peft.LoraModel(model, adapters, "recovery")
        try:
            masters = Masters([p for p in model.parameters() if p.requires_grad], run)
            report = train(model, masters, tokens, run, context)
            masters.restore_precision()
            tuner.merge_and_unload()
        except BaseException:
            tuner.unload()
            raise
        finally:
            model.requires_grad_(False)  # noqa: FBT003
            model.eval()
    return report
