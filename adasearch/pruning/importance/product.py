"""Product: powers of weight, activation norm and gradient, multiplied element by element."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adasearch.documents import NonNegative, value
from adasearch.pruning.importance import GRADIENTS, Gradient, GroupView, Probe
from adasearch.pruning.reduction import Across, Inside, across, inside
from adasearch.registry import IMPORTANCE


@value
class ProductOptions:
    """Settings.

    Args:
        alpha: exponent of the weight's absolute value.
        beta: exponent of the norm of the activation that the weight is multiplied with.
        gamma: exponent of the gradient's size.
        gradient: that size over sequences: absolute value of the ``mean``, root of the mean square (``rms``), or the
            first estimated from forward passes alone (``spsa``).
        scale: of the gradients of each matrix before the power: ``minmax`` to [0, 1], or ``none``.
        inside: how the elements of a unit in one matrix become one number.
        across: how the numbers of its matrices become one.
        probe: ``all`` matrices that units own parts of, or the ``output`` projection alone.
    """

    alpha: NonNegative = 1.0
    beta: NonNegative = 1.0
    gamma: NonNegative = 0.0
    gradient: Gradient = "mean"
    scale: Literal["none", "minmax"] = "none"
    inside: Inside = "sum"
    across: Across = "sum"
    probe: Probe = "output"


def _needs(options: ProductOptions) -> frozenset[str]:
    found: set[str] = set()
    if options.beta:
        found |= {"moments"} if options.probe == "output" else {"moments", "inputs"}
    if options.gamma:
        found.add(GRADIENTS[options.gradient])
    return frozenset(found)


def _gradients(view: GroupView, name: str, options: ProductOptions) -> Tensor:
    """Return the size of the gradients of a matrix (U × rows per unit × elements per row)."""
    sizes = view.gradients(name, options.gradient).double()
    if options.scale == "none":
        return sizes
    # The smallest float keeps a matrix of equal gradients at zero instead of 0/0.
    return (sizes - sizes.min()) / (sizes.max() - sizes.min()).clamp_min(torch.finfo(sizes.dtype).tiny)


def _elements(view: GroupView, name: str, options: ProductOptions) -> Tensor:
    """Return the product for each element of a matrix (U × rows per unit × elements per row)."""
    elements = view.rows_of(name).double().abs().pow(options.alpha)
    if options.beta:
        elements = elements * view.norms(name).pow(options.beta)
    if options.gamma:
        elements = elements * _gradients(view, name, options).pow(options.gamma)
    return elements


@IMPORTANCE.register(options=ProductOptions, needs=_needs)
def score(view: GroupView, options: ProductOptions) -> Tensor:
    """Return |W_ij|^alpha * n_j^beta * |g_ij|^gamma over the elements that a unit owns (U).

    n_j = sqrt(E[x_j^2]), the norm of input feature j up to a factor that all units share, and g the gradient, likewise.
    Spans, as the expressions that Pruner-Zero (arXiv 2406.02924) and OptiShear (arXiv 2502.10735) search, among others:
    Wanda-SP (1, 1, 0, ``sum``), magnitude (p, 0, 0, ``sum``), the error of leaving a feature out E[x_j^2] ||W_:,j||^2
    (2, 2, 0, ``sum``), activation norm times column norm (1, 1, 0, ``l2``), LoRAP's score of channels (arXiv
    2404.09695: 1, 1, 0, ``l2``, over ``all`` matrices), first-order Taylor by element (1, 0, 1), and Pruner-Zero's own
    W^2 minmax(|g|) (2, 0, 1).
    """
    parts = [inside(_elements(view, name, options), options.inside) for name in view.members(options.probe)]
    return across(parts, options.across)
