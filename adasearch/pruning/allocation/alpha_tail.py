"""Alpha tail: layers whose weights have lighter-tailed spectra, a sign of less training, lose more."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adasearch.documents import Fraction, value
from adasearch.errors import TrialError
from adasearch.pruning.allocation import AllocationContext
from adasearch.registry import ALLOCATION

Tail = Literal["peak", "median"]

_BINS = 100
"""Of the histogram whose highest bin is the peak."""

_REACH = 1.5
"""The tail may begin at up to this multiple of the peak."""

_KNOWN: Any = WeakIdKeyDictionary()
"""Exponents of weights that this process met before, by tensor, then by its version and the tail: spectra cost seconds
to minutes, and all trials of a worker share the dense weights."""


@value
class AlphaTailOptions:
    """Settings, the defaults those of AlphaPruning's released code.

    Args:
        eps: the ratios go from 1 - eps to 1 + eps.
        tail: where the power law begins: ``peak`` tries every eigenvalue up to 1.5 times the peak of the density (over
            logarithms) and takes the best fit, ``median`` takes the larger half.
    """

    eps: Fraction = 0.3
    tail: Tail = "peak"


def eigenvalues(weight: Tensor) -> Tensor:
    """Return the squared singular values of a matrix that are not zero up to rounding (N, ascending, float64)."""
    w = weight.detach().double()
    found: Tensor = torch.linalg.eigvalsh(w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w).cpu()
    return found[found > found[-1] * len(found) * torch.finfo(torch.float64).eps]


def exponent(values: Tensor, tail: Tail) -> float:
    """Return the exponent of the power law that the largest of `values` (N >= 2, ascending, > 0) follow, > 1.

    With values_i the start of the tail and n = N - i: 1 + n / sum_{j >= i} log(values_j / values_i), the maximum
    likelihood estimate (Hill 1975). ``peak`` chooses the start of the smallest Kolmogorov-Smirnov distance (Clauset,
    Shalizi, Newman 2009) up to `_REACH` times the lower edge of the highest bin of log10 of the values. Infinite where
    all values of the tail are equal.
    """
    logs, number = values.log(), len(values)
    sizes = torch.arange(number, 0, -1, dtype=torch.float64)
    alphas = 1 + sizes / (logs.flip(0).cumsum(0).flip(0) - sizes * logs)
    if tail == "median":
        return float(alphas[number // 2])
    decades = values.log10()
    counts = torch.histc(decades, _BINS)
    edge = decades[0] + (decades[-1] - decades[0]) * int(counts.argmax()) / _BINS
    starts = int((values[:-1] <= _REACH * 10**edge).sum())
    gaps = []
    for i in range(starts):
        model = 1 - (values[i:] / values[i]) ** (1 - alphas[i])
        empirical = torch.arange(number - i, dtype=torch.float64) / (number - i)
        gaps.append(float((model - empirical).abs().max()))
    return float(alphas[gaps.index(min(gaps))])


def _known_exponent(name: str, weight: Tensor, tail: Tail) -> float:
    """Return the exponent of a weight's spectrum, computed once for each tensor.

    Raises:
        TrialError: the spectrum has no tail (kind ``nan``).
    """
    key = (weight._version, tail)
    held: dict[tuple[int, Tail], float] = _KNOWN.setdefault(weight, {})
    if key not in held:
        values = eigenvalues(weight)
        held[key] = exponent(values, tail) if len(values) > 1 else math.inf
    if not math.isfinite(held[key]):
        raise TrialError("nan", f"{name} must have different singular values for alpha_tail", "plan")
    return held[key]


@ALLOCATION.register(options=AlphaTailOptions, needs=lambda _: frozenset())
def shape(context: AllocationContext, options: AlphaTailOptions) -> dict[str, float]:
    """Return 1 - eps + 2 eps (q_l - min q) / (max q - min q), q_l the mean exponent over the matrices of layer l.

    AlphaPruning (NeurIPS 2024, arXiv 2410.10912), ratios by layer. Its code also has a lower bound for the start of the
    tail, which compares eigenvalues with a logarithm and excludes nothing where the peak lies below 1; here is none.
    The spectra of a model are computed once per process.

    Raises:
        TrialError: a matrix has no spectrum to speak of (kind ``nan``).
    """
    means = {}
    for layer, path in context.layer_paths.items():
        matrices = {n: w for n, w in context.weights.items() if n.startswith(f"{path}.") and w.ndim == 2}
        means[layer] = sum(_known_exponent(n, w, options.tail) for n, w in matrices.items()) / len(matrices)
    least = min(means.values())
    width = max(means.values()) - least or 1.0  # where no layer differs, all ratios are the same
    low, step = 1 - options.eps, 2 * options.eps / width
    return context.spread({layer: low + step * (q - least) for layer, q in means.items()})
