"""PAT: dimensions whose mask closes while the model is tuned with sparsification modules go (pruning-aware tuning)."""

from __future__ import annotations

from torch import Tensor

from adasearch.documents import Count, Fraction, Positive, Share, value
from adasearch.pruning.hidden import HiddenContext
from adasearch.pruning.hidden.magnitude import magnitudes
from adasearch.pruning.learning import LearningOptions, check_rank
from adasearch.pruning.reduction import normalised
from adasearch.registry import HIDDEN
from adasearch.sections import Dropout


@value
class PatOptions(LearningOptions):
    """Settings of PAT beside those of all that learn.

    Args:
        remove: the fraction of the dimensions that goes.
        inner: inner size of a sparsification module; published with 200 for 4096 dimensions.
        rank: of the updates of the projections that read the residual stream.
        alpha: an update of rank R counts `alpha` / R times.
        dropout: share of an update's inputs that is dropped while training.
        mask_lr: learning rate of the mask's parameters m.
        frozen: share of the steps after which m stays, and the mask is 0 or 1.
        prior: how much the ranks by `magnitude`, less 1/2, count at the start of m; published with 0.
    """

    remove: Share = 0.1
    inner: Count = 16
    rank: Count = 8
    alpha: Positive = 16.0
    dropout: Dropout = 0.0
    mask_lr: Positive = 0.02
    frozen: Fraction = 0.8


@HIDDEN.register(options=PatOptions, needs=lambda _: frozenset(), learns=True, check=check_rank)
def score(context: HiddenContext, options: PatOptions) -> Tensor:
    """Return the learnt mask parameters m (D): PAT (arXiv 2408.14721), see `tuning.sparsification`.

    The model that is left is the tuned one, its modules folded into its weights. Published with modules behind every
    projection and after the embedding, LoRA on all of them; ours stand behind those that write to the residual stream,
    where they do what LoRA does, and m begins at a criterion.

    Raises:
        TrialError: a loss is not finite (kind ``nan``), or text or teacher cannot be had.
    """
    assert context.train is not None, "this rule must be given a way to train"
    start = options.prior * (normalised(magnitudes(context), "rank") - 0.5)
    return context.train(start, context.number, options)
