"""Spare bottom: the channels that another criterion finds least important stay, those next to them go."""

from __future__ import annotations

from torch import Tensor

from adasearch.config import Component
from adasearch.documents import Share, value
from adasearch.pruning.importance import Criterion, GroupView, needs, score_by
from adasearch.registry import IMPORTANCE, NoOptions


@value
class SpareBottomOptions:
    """Settings: the criterion `of` which the lowest `share` of the channels of each MLP is spared, rounded down."""

    of: Criterion = Component(type="wanda_sp", options=NoOptions())
    share: Share = 0.01


@IMPORTANCE.register(options=SpareBottomOptions, needs=lambda options: needs(options.of))
def score(view: GroupView, options: SpareBottomOptions) -> Tensor:
    """Return the criterion's scores (U), those of the spared channels lifted above all others, in their order.

    The released codes of LoRAP (arXiv 2404.09695) and SlimLLM (arXiv 2505.22689) keep the lowest 1 % on purpose and cut
    upwards from there. Groups of attention stay as they are.
    """
    scores = score_by(options.of, view)
    # A hair of slack: 0.29 of 100 channels is 29.
    spared = int(options.share * len(scores) + 1e-9) if view.group.kind == "mlp" else 0
    lowest = scores.argsort(stable=True)[:spared]
    lifted = scores.clone()
    lifted[lowest] += 2 * (scores.max() - scores.min())
    return lifted
