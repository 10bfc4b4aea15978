"""Two corpora: one criterion on two calibration samples, that of a domain and that of general text."""

from __future__ import annotations

from torch import Tensor

from adasearch.config import Component
from adasearch.documents import Share, value
from adasearch.pruning.importance import Criterion, GroupView, needs, score_by
from adasearch.pruning.importance.taylor import TaylorOptions
from adasearch.pruning.reduction import Normalise, normalised
from adasearch.pruning.statistics import of_other
from adasearch.registry import IMPORTANCE


@value
class TwoCorporaOptions:
    """Settings.

    Args:
        of: the criterion.
        corpus: of the general sample, which is as large as the trial's own and drawn alike.
        share: weight of the general sample's scores; those of the trial's own, the domain, have the rest.
        normalise: of each sample's scores within a group, so that they can be added.
    """

    of: Criterion = Component(type="taylor", options=TaylorOptions(order="mix"))
    corpus: str = "stdlib"
    share: Share = 0.5
    normalise: Normalise = "mean"


def _needs(options: TwoCorporaOptions) -> frozenset[str]:
    own = needs(options.of)
    return own | of_other(own, options.corpus)


@IMPORTANCE.register(options=TwoCorporaOptions, needs=_needs)
def score(view: GroupView, options: TwoCorporaOptions) -> Tensor:
    """Return (1 - share) N(own) + share N(general) with N the normalisation (U).

    The idea of D-Pruner (arXiv 2405.06275), which keeps what matters to general text and to a domain. There the general
    importance enters the domain's loss, as a penalty on changes of the weights, and so its gradients; here both
    importances are taken of the same weights and added.
    """
    views = view, view.of_corpus(options.corpus)
    domain, general = (normalised(score_by(options.of, each), options.normalise) for each in views)
    return domain.lerp(general, options.share)
