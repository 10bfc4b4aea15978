"""No recovery: the model is scored as it was cut."""

from __future__ import annotations

from torch import Tensor, nn

from adasearch.pruning.structure import ModelStructure
from adasearch.registry import RECOVERY, NoOptions
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport


@RECOVERY.register()
def recover(
    model: nn.Module,
    structure: ModelStructure,  # noqa: ARG001 - signature of the set
    tokens: Tensor,  # noqa: ARG001
    options: NoOptions,  # noqa: ARG001
    context: RecoveryContext,  # noqa: ARG001
) -> RecoveryReport:
    """Return an empty report; the model is only put in eval mode without gradients."""
    model.requires_grad_(False)  # noqa: FBT003
    model.eval()
    return RecoveryReport()
