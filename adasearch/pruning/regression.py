"""Importance by regression: the loss of randomly masked models, explained by which units are there (Bonsai).

Bonsai (arXiv 2402.05406) needs forward passes only. Each round takes a prior of the units, such as their activation
norm, keeps the strongest for certain and tries the others: masks at random and their complements, one loss each, and a
linear model of the loss whose coefficients are the importances. Pure but for the loss, which is given as a function.

Shape letters: U units over all groups, M masks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adasearch.documents import Count, Fraction, NonNegative, value


@value
class RegressionOptions:
    """Settings.

    Args:
        fraction: share of the units that each mask removes; twice as many are tried, the others always stay.
        masks: number of masks M, rounded up to an even one: each comes with its complement; Bonsai takes 200.
        ridge: weight of the squared coefficients per mask, relative to the variance of what is tried.
    """

    fraction: Fraction = 0.05
    masks: Count = 200
    ridge: NonNegative = 1e-3


def tried_units(prior: Tensor, fraction: float) -> Tensor:
    """Return the indices of the units that masks may remove, ascending: twice `fraction` of all, of the lowest prior.

    Args:
        prior: U scores, higher = keep; of equal ones the first is tried first.
        fraction: share of the units that one mask removes.
    """
    half = max(1, round(fraction * len(prior)))
    return torch.sort(prior, stable=True).indices[: min(2 * half, len(prior))].sort().values


def sample_masks(prior: Tensor, fraction: float, masks: int, seed: int) -> Tensor:
    """Return M masks of what stays (M × U bools), each followed by its complement among the units that are tried.

    Units are drawn for removal without replacement, with probabilities proportional to how far their prior lies below
    the highest of those tried.
    """
    tried = tried_units(prior, fraction)
    generator = torch.Generator().manual_seed(seed)
    below = (prior[tried].max() - prior[tried]).double()
    # The highest may go as well, if seldom: it must be seen to be judged.
    weights = below + (1e-3 * below.mean() if below.any() else 1.0)
    rows: list[Tensor] = []
    while len(rows) < masks:
        gone = tried[torch.multinomial(weights, len(tried) // 2, generator=generator)]
        mask = torch.ones(len(prior), dtype=torch.bool)
        mask[gone] = False
        complement = torch.ones_like(mask)
        complement[tried] = ~mask[tried]
        rows += [mask, complement]
    return torch.stack(rows)


def coefficients(masks: Tensor, losses: Tensor, ridge: float) -> Tensor:
    """Return by how much the loss falls when a unit stays (U, float64), infinite where all masks agree on it.

    With X the masks as 0 and 1 and y the losses, both centred: beta = -(X^T X / M + ridge v I)^-1 X^T y / M, v the mean
    variance of the columns. The intercept is not shrunk.

    Args:
        masks: M × U, what stays.
        losses: M finite numbers.
        ridge: at least 0; with 0 it is the solution of least norm.
    """
    seen = masks.any(0) & ~masks.all(0)
    x = masks[:, seen].double()
    x = x - x.mean(0)
    y = losses.double() - losses.double().mean()
    gram = x.mT @ x / len(x)
    shift = ridge * gram.diagonal().mean() if bool(seen.any()) else 0.0
    found = torch.full((masks.shape[1],), torch.inf, dtype=torch.float64)
    found[seen] = -torch.linalg.pinv(gram + shift * torch.eye(len(gram), dtype=gram.dtype), hermitian=True) @ (
        x.mT @ y / len(x)
    )
    return found


def importance(prior: Tensor, loss: Callable[[Tensor], float], options: RegressionOptions, seed: int) -> Tensor:
    """Return the importance of each unit (U, float64, higher = keep): its coefficient, infinite where it was not tried.

    Masks without a finite loss (a model that overflows) are counted as the worst of the finite ones.

    Args:
        prior: U scores, higher = keep.
        loss: of the model under a mask of what stays (U bools); asked once for each mask.
        options: of the regression.
        seed: of the masks.
    """
    masks = sample_masks(prior, options.fraction, options.masks, seed)
    losses = torch.tensor([loss(mask) for mask in masks], dtype=torch.float64)
    finite = losses.isfinite()
    worst = losses[finite].max() if bool(finite.any()) else torch.zeros(())
    return coefficients(masks, torch.where(finite, losses, worst), options.ridge)
