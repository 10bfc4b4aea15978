"""Activation norm: how large the activations of a unit are, whatever the output projection makes of them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from adasearch.documents import value
from adasearch.pruning.importance import GroupView
from adasearch.registry import IMPORTANCE


@value
class ActNormOptions:
    """Settings.

    Args:
        average: over ``tokens``, the mean square; over ``normalised_tokens``, each divided by the norm of all features
            of its layer, so that every token has an equal say; over ``sequences``, the norm within each of them.
    """

    average: Literal["tokens", "normalised_tokens", "sequences"] = "tokens"


def _needs(options: ActNormOptions) -> frozenset[str]:
    return frozenset({"moments" if options.average == "tokens" else "votes"})


@IMPORTANCE.register(options=ActNormOptions, needs=_needs)
def score(view: GroupView, options: ActNormOptions) -> Tensor:
    """Return the norm of each unit's activations, sqrt(sum_j s_j^2) with s_j the norm of one feature (U).

    s_j is sqrt(E[x_j^2]) over ``tokens``: the score of CFSP (arXiv 2409.13199) as released, whose three weight terms
    are each divided by their own column sums, which leaves a constant and a power of this norm, so the same order of
    channels. Over ``normalised_tokens`` it is the score of GRIFFIN (arXiv 2404.01365) on all calibration tokens, over
    ``sequences`` that of 2SSP (arXiv 2501.17771); both up to a factor that all units share.
    """
    if options.average == "tokens":
        squares = view.moments().second_moment
    elif options.average == "sequences":
        squares = view.votes().sequence.square()
    else:
        squares = view.votes().token
    return view.feature(squares).sum(1).sqrt()
