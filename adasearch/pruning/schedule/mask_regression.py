"""Mask regression: before every step the units at risk are tried, in random masks, and judged by the loss (Bonsai)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adasearch import models
from adasearch.documents import Count, Fraction, NonNegative, value
from adasearch.pruning import masking, regression
from adasearch.pruning.reduction import normalised
from adasearch.pruning.regression import RegressionOptions
from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.pruning.schedule.iterative import in_steps
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import SCHEDULE


@value
class MaskRegressionOptions:
    """Settings.

    Args:
        steps: number of equal steps in which the budget is reached.
        fraction: share of the units that each mask removes; twice as many are tried, those of the lowest scores.
        masks: number of masks of each step; a loss each. Bonsai takes 200.
        ridge: of the regression, see `regression.coefficients`.
        sequences: of the calibration sample, that losses are taken over; Bonsai takes 32.
    """

    steps: Count = 4
    fraction: Fraction = 0.05
    masks: Count = 200
    ridge: NonNegative = 1e-3
    sequences: Count = 32


def _joined(structure: ModelStructure, parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([parts[group.name] for group in structure.groups])


def _split(structure: ModelStructure, whole: Tensor) -> dict[str, Tensor]:
    parts = torch.split(whole, [group.units for group in structure.groups])
    return {group.name: part for group, part in zip(structure.groups, parts, strict=True)}


@SCHEDULE.register(options=MaskRegressionOptions, compensates=False, selects=False, sources=None, learns=False)
def decide(context: ScheduleContext, options: MaskRegressionOptions) -> Decision:
    """Return which units stay when, before every step, the loss of masked models judges them: Bonsai.

    Bonsai (arXiv 2402.05406) takes the criterion as a prior, here by its rank within each group, so that groups
    compare. Units of the lowest prior are removed at random, in masks and their complements; the coefficient of a unit
    in a linear model of the loss is its score. Units that were not tried score above all that were, by their prior.
    Allocate by one threshold over these scores to remove what costs least anywhere, as Bonsai does.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score or a statistic is not finite (kind ``nan``).
    """
    structure = context.structure
    model = models.assemble(models.empty_model(context.config), context.weights)
    model = model.requires_grad_(requires_grad=False).to(context.device)
    tokens = context.tokens()[: options.sequences]
    wanted = RegressionOptions(fraction=options.fraction, masks=options.masks, ridge=options.ridge)

    def refine(scores: dict[str, Tensor], there: dict[str, Tensor]) -> dict[str, Tensor]:
        standing = _joined(structure, there)
        prior = _joined(structure, {name: normalised(part, "rank") for name, part in scores.items()})

        def loss(mask: Tensor) -> float:
            stays = standing.clone()
            stays[standing] = mask
            with masking.masked(model, structure, _split(structure, stays)):
                return masking.loss(model, tokens)

        found = regression.importance(prior[standing], loss, wanted, context.trial.seed)
        tried = found.isfinite()
        low, high = found[tried].min(), found[tried].max()
        judged = prior.clone()
        judged[standing] = torch.where(tried, found, high + (high - low).clamp_min(1e-6) * (1 + prior[standing]))
        return {name: part.float() for name, part in _split(structure, judged).items()}

    return Decision(plan=in_steps(context, options.steps, refine))
