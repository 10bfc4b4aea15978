"""By kind: one criterion for MLPs, another for attention."""

from __future__ import annotations

from torch import Tensor

from adasearch.config import Component
from adasearch.documents import value
from adasearch.pruning.importance import Criterion, GroupView, needs, score_by
from adasearch.pruning.importance.act_norm import ActNormOptions
from adasearch.registry import IMPORTANCE, NoOptions


@value
class ByKindOptions:
    """Settings: the criterion of `mlp` groups and that of `attention` groups.

    Their scores do not compare across kinds: allocate without scores, or normalise them.
    """

    mlp: Criterion = Component(type="act_norm", options=ActNormOptions())
    attention: Criterion = Component(type="wanda_sp", options=NoOptions())


@IMPORTANCE.register(options=ByKindOptions, needs=lambda options: needs(options.mlp) | needs(options.attention))
def score(view: GroupView, options: ByKindOptions) -> Tensor:
    """Return the scores by the criterion of the group's kind (U), as SlimLLM (arXiv 2505.22689) judges both apart."""
    return score_by(options.attention if view.group.kind == "attention" else options.mlp, view)
