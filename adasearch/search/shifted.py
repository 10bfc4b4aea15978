"""A Gaussian process around a mean that is known beforehand, for `surrogate.fit`."""

from __future__ import annotations

from collections.abc import Callable

from gpytorch.means import ConstantMean
from torch import Tensor

Expected = Callable[[Tensor], Tensor]
"""Features (...×n×d) -> scores that are expected there (...×n), differentiable."""


class Shifted(ConstantMean):  # type: ignore[misc]
    """The mean ``expected(x) / spread + constant``; the constant is fitted.

    Args:
        expected: in units of the scores.
        spread: units of the scores for one unit of the model.
    """

    def __init__(self, expected: Expected, spread: float) -> None:
        super().__init__()
        self._expected = expected
        self._spread = spread

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean (...×n) at features (...×n×d)."""
        level: Tensor = super().forward(x)
        return level + self._expected(x) / self._spread
