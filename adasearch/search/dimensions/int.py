"""A whole number in a range: ``{int: [8, 128], log: true}``, ``{int: [32, 256], step: 32}``."""

from __future__ import annotations

from adasearch.documents import Count, value
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import IntParameter, Parameter, Scalar


@value
class IntOptions:
    """`range`: least and greatest value. `log`: equal ratios are equal steps. `step`: distance of neighbours."""

    range: tuple[int, int] = (0, 1)
    log: bool = False
    step: Count = 1


def _decode(values: dict[str, Scalar], path: str, options: IntOptions) -> Scalar:
    del options
    return values[path]


def _encode(item: object, path: str, options: IntOptions) -> dict[str, Scalar]:
    low, high = options.range
    if isinstance(item, bool) or not isinstance(item, int):
        raise ValueError(f"{item!r} is no whole number")
    if not low <= item <= high or (item - low) % options.step:
        step = f" in steps of {options.step}" if options.step > 1 else ""
        raise ValueError(f"{item} is not in {low}..{high}{step}")
    return {path: item}


@DIMENSIONS.register(options=IntOptions, decode=_decode, encode=_encode)
def parameters(path: str, options: IntOptions) -> dict[str, Parameter]:
    """Return the one parameter of a range.

    Raises:
        ValueError: the range is empty, does not suit its step, or starts below 1 though `log` is set.
    """
    low, high = options.range
    if low > high:
        raise ValueError(f"must be [low, high] with low <= high, given [{low}, {high}]")
    if options.log and (low < 1 or options.step != 1):
        raise ValueError(f"must start at 1 or above and have step 1 when log is true, given [{low}, {high}]")
    if (high - low) % options.step:
        raise ValueError(f"must be a whole number of steps of {options.step} long, given [{low}, {high}]")
    return {path: IntParameter(low=low, high=high, log=options.log, step=options.step)}
