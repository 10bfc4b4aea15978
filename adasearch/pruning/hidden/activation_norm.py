"""Activation norm: dimensions that are small after normalisation, in all layers together, go."""

from __future__ import annotations

import torch
from torch import Tensor

from adasearch.documents import Share, value
from adasearch.pruning.hidden import HiddenContext
from adasearch.registry import HIDDEN


@value
class ActivationNormOptions:
    """Settings: `remove`, the fraction of the dimensions that goes."""

    remove: Share = 0.1


@HIDDEN.register(options=ActivationNormOptions, needs=lambda _: frozenset({"inputs"}), learns=False)
def score(context: HiddenContext, options: ActivationNormOptions) -> Tensor:  # noqa: ARG001 - the signature of the set
    """Return the sum over sublayers of the norm over tokens of each dimension after the sublayer's norm (D, float64).

    Minitron (arXiv 2407.14679), section 2.2: activations of the layer norms, aggregated by L2 over tokens, summed over
    layers; it takes the mean over batches, which is the same here up to a factor.
    """
    found = [context.known.inputs(group.name).second_moment.sqrt() for group in context.structure.groups]
    return torch.stack(found).sum(0)
