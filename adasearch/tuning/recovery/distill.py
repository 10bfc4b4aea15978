"""Distillation: the smaller model learns the dense one's predictions, and perhaps its states, by LoRA or as a whole."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from adasearch.documents import Index, NonNegative, Positive, value
from adasearch.errors import TrialError
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport, _adapters, full, lora
from adasearch.tuning.recovery.lora import LoraOptions
from adasearch.tuning.training import PHASE


@value
class DistillOptions(LoraOptions):
    """Settings of distillation beside those of `lora`; `training.Lesson` has the loss.

    Args:
        rank: of the updates; 0 trains all weights, which wants a far smaller `lr`, and no other setting of an update
            counts.
        distill: weight of the divergence from the dense model's predictions.
        temperature: that predictions of both models are softened by.
        hidden: weight of the relative squared error of the last hidden states; above 0 the hidden size must be that of
            the dense model.
        hard: weight of the next-token loss; 0 learns from the dense model alone.
        weight_decay: AdamW's, on matrices only.
    """

    rank: Index = 8
    distill: Positive = 1.0
    temperature: Positive = 1.0
    hidden: NonNegative = 0.0
    hard: NonNegative = 0.0
    weight_decay: NonNegative = 0.0


def check(options: DistillOptions, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Return when the projections of a model (M × K by module path) can have the updates that are asked for, if any.

    Raises:
        ConfigError: names the setting.
    """
    if options.rank:
        _adapters.check(options, shapes)


@RECOVERY.register(options=DistillOptions, check=check)
def recover(
    model: nn.Module, structure: ModelStructure, tokens: Tensor, options: DistillOptions, context: RecoveryContext
) -> RecoveryReport:
    """Train on the stream with the dense model as the teacher; the signature is that of the set.

    The divergence is forward, KL(dense || smaller), over the whole vocabulary: Minitron (arXiv 2407.14679) found it the
    best loss after pruning, and logits alone enough where few layers went. A step costs one dense forward more.

    Raises:
        TrialError: there is no dense model, or states of other sizes are compared (kind ``config``); a loss that is not
            finite; or a stream that is too short.
    """
    if options.hidden > 0 and structure.outline.hidden is not None:
        problem = f"recovery.hidden must be 0 where hidden dimensions go, given {options.hidden}"
        raise TrialError("config", f"{problem}: states of other sizes do not compare", PHASE)
    strategy = lora if options.rank else full
    report: RecoveryReport = strategy.recover(model, structure, tokens, options, context)
    return report
