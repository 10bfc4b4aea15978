"""A real number in a range: ``{float: [1.0e-5, 1.0e-3], log: true}``."""

from __future__ import annotations

from adasearch.documents import Finite, value
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import FloatParameter, Parameter, Scalar


@value
class FloatOptions:
    """`range`: least and greatest value. `log`: equal ratios are equal steps."""

    range: tuple[Finite, Finite] = (0.0, 1.0)
    log: bool = False


def _decode(values: dict[str, Scalar], path: str, options: FloatOptions) -> Scalar:
    del options
    return values[path]


def _encode(item: object, path: str, options: FloatOptions) -> dict[str, Scalar]:
    low, high = options.range
    if isinstance(item, bool) or not isinstance(item, int | float):
        raise ValueError(f"{item!r} is no number")
    if not low <= item <= high:
        raise ValueError(f"{item:g} is not in {low:g}..{high:g}")
    return {path: float(item)}


@DIMENSIONS.register(options=FloatOptions, decode=_decode, encode=_encode)
def parameters(path: str, options: FloatOptions) -> dict[str, Parameter]:
    """Return the one parameter of a range.

    Raises:
        ValueError: the range is empty, or does not lie above zero though `log` is set.
    """
    low, high = options.range
    if low > high:
        raise ValueError(f"must be [low, high] with low <= high, given [{low:g}, {high:g}]")
    if options.log and low <= 0:
        raise ValueError(f"must lie above zero when log is true, given [{low:g}, {high:g}]")
    return {path: FloatParameter(low=low, high=high, log=options.log)}
