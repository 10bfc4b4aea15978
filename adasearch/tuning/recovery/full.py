"""Full fine-tuning: AdamW over all weights, with float32 masters."""

from __future__ import annotations

from torch import Tensor, nn

from adasearch.documents import Count, NonNegative, Positive, value
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY
from adasearch.sections import SequenceLength, TuningOptions
from adasearch.tuning.loop import train
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.training import TrainingConfig, seeded


@value
class FullOptions(TuningOptions):
    """Settings of full fine-tuning, beside those of all that train.

    Args:
        weight_decay: AdamW's, on matrices only.
    """

    tokens: Count = 131072
    length: SequenceLength = 256
    batch: Count = 8
    lr: Positive = 5e-5
    weight_decay: NonNegative = 0.0


@RECOVERY.register(options=FullOptions)
def recover(
    model: nn.Module,
    structure: ModelStructure,  # noqa: ARG001 - signature of the set
    tokens: Tensor,
    options: FullOptions,
    context: RecoveryContext,
) -> RecoveryReport:
    """Train every weight on the stream; the signature is that of the set.

    Forward and backward run in the dtype of the model, the update in float32: for a bfloat16 model up to 18 bytes
    per parameter are needed (weight 2, float32 gradient 4, master 4, AdamW 8). Masters, not autocast: one copy per
    step replaces a cast of every weight in every forward.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    run = TrainingConfig.of(options)
    model.requires_grad_(True)  # noqa: FBT003
    try:
        with seeded(context):
            return train(model, Masters(list(model.parameters()), run), tokens, run, context)
    finally:
        model.zero_grad(set_to_none=True)
        model.requires_grad_(False)  # noqa: FBT003
        model.eval()
