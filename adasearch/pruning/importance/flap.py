"""FLAP: how much a feature fluctuates, weighted by the norm of its column in the output projection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adasearch.documents import Positive, value
from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE


@value
class FlapOptions:
    """Settings.

    Args:
        metric: ``wifv`` Var(x_j) * ||W_:,j||_2^2, ``ifv`` Var(x_j), ``wifn`` mean_i |W_ij| * sqrt(E[x_j^2]).
        attn_power: exponent of the feature scores of attention before they are standardised; the released code
            squares them, MLP scores stay as they are.
        standardise: whether feature scores become z-scores within their layer, as published; the scores then compare
            across layers as they are, and allocation should not normalise them again.
    """

    metric: Literal["wifv", "ifv", "wifn"] = "wifv"
    attn_power: Positive = 2.0
    standardise: bool = True


@IMPORTANCE.register(options=FlapOptions, needs=lambda _: frozenset({"moments"}))
def score(view: GroupView, options: FlapOptions) -> Tensor:
    """Return the mean feature score of each unit (U).

    FLAP (arXiv 2312.11983). ``wifv`` is exactly the mean squared error of the projection's output when one feature is
    replaced by its mean.
    """
    moments, weight = view.moments(), view.output_weight().double()
    if options.metric == "wifn":
        features = view.feature(moments.second_moment).sqrt() * weight.abs().mean(2)
    else:
        norm = weight.square().sum(2) if options.metric == "wifv" else torch.ones(())
        features = view.feature(moments.variance) * norm
    if view.group.kind == "attention":
        features = features.pow(options.attn_power)
    if options.standardise and features.numel() > 1:
        # The smallest float keeps a layer of equal features at zero instead of 0/0.
        features = (features - features.mean()) / features.std().clamp_min(torch.finfo(features.dtype).tiny)
    return features.mean(1)
