"""What a calibration sample says about a model: accumulators that merge, and the frozen `Statistics` they end in.

Families of statistics (the strings that criteria, allocators and compensators name in their `needs`):

- ``moments``: mean and variance of every input feature of each group's output projection, over tokens.
- ``covariance``: the uncentred Gram matrix X^T X of the same features.
- ``gradient``: W * dL/dW of each member matrix, summed per row of its cut dimension, with and without absolute value.
- ``fisher``: the same with the diagonal empirical Fisher information F, the mean over sequences of squared gradients.

L is the mean over sequences of the mean next-token cross-entropy: no statistic depends on how sequences are batched.
Shape letters: T tokens, F features of an output projection, R rows of a parameter along its cut dimension.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adasearch.errors import DataError

FAMILIES = frozenset({"moments", "covariance", "gradient", "fisher"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean and sum of squared deviations `m2` of F features over `count` tokens, float64.

    Deviations are kept instead of raw squares because the variance of a feature with a large mean would cancel.
    """

    count: int
    mean: Tensor
    m2: Tensor

    @staticmethod
    def of(x: Tensor) -> Moments:
        """Return the moments of the rows of `x` (T × F, any float type)."""
        exact = x.double()
        mean = exact.mean(0)
        return Moments(count=x.shape[0], mean=mean, m2=(exact - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both samples together (Chan, Golub, LeVeque 1979)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / count)
        return Moments(count=count, mean=mean, m2=m2)

    @property
    def variance(self) -> Tensor:
        """Return the population variance of each feature (F)."""
        return self.m2 / self.count

    @property
    def second_moment(self) -> Tensor:
        """Return the mean square of each feature (F)."""
        return self.variance + self.mean.square()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Covariance:
    """Gram matrix X^T X (F × F) and mean (F) over `count` tokens.

    The Gram matrix is float32: at F = 1536 and 30 layers float64 would take 0.6 GB. Its relative error is about
    1e-7 * sqrt(T), far below the damping (0.01 of the mean diagonal) with which it is inverted.
    """

    count: int
    mean: Tensor
    gram: Tensor

    @staticmethod
    def of(x: Tensor) -> Covariance:
        """Return the covariance of the rows of `x` (T × F, any float type)."""
        single = x.float()
        return Covariance(count=x.shape[0], mean=x.double().mean(0), gram=single.T @ single)

    def merge(self, other: Covariance) -> Covariance:
        """Return the covariance of both samples together."""
        count = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        return Covariance(count=count, mean=mean, gram=self.gram + other.gram)

    def matrix(self, *, centred: bool = False) -> Tensor:
        """Return E[x x^T] (F × F, float64), or the covariance E[x x^T] - mean mean^T when `centred`."""
        second = self.gram.double() / self.count
        return second - torch.outer(self.mean, self.mean) if centred else second


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return `matrix` (F × F) plus `damping` times its mean diagonal on the diagonal.

    A sample in which every feature is zero has no scale; it gets the identity, so that nothing divides by zero.
    """
    scale = matrix.diagonal().mean()
    shift = damping * scale if scale > 0 else torch.ones_like(scale)
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientSum:
    """Sum over sequences of one parameter's gradient, and of its square when the Fisher information is asked for.

    The tensors have the parameter's shape, float32. `add` changes them in place: they are the largest thing held.
    """

    total: Tensor
    squares: Tensor | None

    @staticmethod
    def zeros(parameter: Tensor, *, fisher: bool) -> GradientSum:
        """Return the sum over no sequence, for a parameter of this shape."""
        zero = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        return GradientSum(total=zero, squares=torch.zeros_like(zero) if fisher else None)

    def add(self, gradient: Tensor) -> None:
        """Add the gradient of one batch; of exactly one sequence where squares are kept."""
        single = gradient.float()
        self.total.add_(single)
        if self.squares is not None:
            self.squares.addcmul_(single, single)

    def merge(self, other: GradientSum) -> GradientSum:
        """Return the sum over both samples."""
        both = self.squares is not None and other.squares is not None
        return GradientSum(
            total=self.total + other.total,
            squares=self.squares + other.squares if both else None,  # type: ignore[operator]
        )

    def read(self, weight: Tensor, dim: int, sequences: int) -> dict[str, Tensor]:
        """Return sums over each row of `weight` along `dim` (R, float64), by name.

        With g the gradient of the mean loss and F the mean squared gradient: ``gradient/elem1`` = sum |W g|,
        ``gradient/signed`` = sum W g, ``fisher/elem2`` = sum W^2 F, ``fisher/mix`` = sum |W g - W^2 F / 2| and
        ``fisher/signed`` = sum W g (LLM-Pruner, arXiv 2305.11627, equations 3 to 5).
        """
        w = weight.float()
        first = w * (self.total / sequences)
        rows = {"gradient/elem1": first.abs(), "gradient/signed": first}
        if self.squares is not None:
            second = w.square() * (self.squares / sequences)
            rows |= {"fisher/elem2": second, "fisher/mix": (first - second / 2).abs(), "fisher/signed": first}
        return {name: item.sum(1 - dim, dtype=torch.float64) for name, item in rows.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of one calibration sample, on the CPU.

    Args:
        tokens: number of tokens that the moments and Gram matrices were taken over.
        tensors: ``family/place/name`` -> tensor, where place is a module (moments, covariance) or a parameter.
    """

    tokens: int
    tensors: Mapping[str, Tensor]

    @property
    def families(self) -> frozenset[str]:
        """Return the families that are held."""
        return frozenset(key.split("/", 1)[0] for key in self.tensors)

    def moments(self, module: str) -> Moments:
        """Return the moments of the input features of `module`."""
        parts = self.tensors
        return Moments(count=self.tokens, mean=parts[f"moments/{module}/mean"], m2=parts[f"moments/{module}/m2"])

    def covariance(self, module: str) -> Covariance:
        """Return the covariance of the input features of `module`."""
        parts = self.tensors
        mean, gram = parts[f"covariance/{module}/mean"], parts[f"covariance/{module}/gram"]
        return Covariance(count=self.tokens, mean=mean, gram=gram)

    def rows(self, family: str, parameter: str, name: str) -> Tensor:
        """Return a sum over each row (R) of `parameter`; `family` and `name` as in `GradientSum.read`."""
        return self.tensors[f"{family}/{parameter}/{name}"]

    def only(self, family: str) -> Statistics:
        """Return the part that belongs to one family."""
        part = {key: item for key, item in self.tensors.items() if key.startswith(f"{family}/")}
        return Statistics(tokens=self.tokens, tensors=part)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of two samples together.

    Only moments and covariance merge: the sums of |W g| of two samples do not follow from those of each (use
    `GradientSum.merge` before they are read).
    """
    assert a.families == b.families <= {"moments", "covariance"}, f"cannot merge {a.families} with {b.families}"
    tensors: dict[str, Tensor] = {}
    for family, module in dict.fromkeys(tuple(key.split("/")[:2]) for key in a.tensors):
        if family == "moments":
            moments = a.moments(module).merge(b.moments(module))
            tensors |= {f"moments/{module}/mean": moments.mean, f"moments/{module}/m2": moments.m2}
        else:
            both = a.covariance(module).merge(b.covariance(module))
            tensors |= {f"covariance/{module}/mean": both.mean, f"covariance/{module}/gram": both.gram}
    return Statistics(tokens=a.tokens + b.tokens, tensors=tensors)


def union(parts: Iterable[Statistics]) -> Statistics:
    """Return families of the same sample side by side."""
    held = list(parts)
    sizes = {part.tokens for part in held}
    assert len(sizes) <= 1, f"families of one sample must count the same tokens, given {sizes}"
    tensors = reduce(lambda left, part: {**left, **part.tensors}, held, dict[str, Tensor]())
    return Statistics(tokens=sizes.pop() if sizes else 0, tensors=tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        content = tensors[name].contiguous().view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))  # type: ignore[arg-type] # numpy has buffers
    return f"{value:08x}"


def save(statistics: Statistics, path: Path) -> None:
    """Write `statistics` to the safetensors file `path` (not atomically: see `calibration.cached`)."""
    tensors = {name: item.contiguous() for name, item in statistics.tensors.items()}
    save_file(tensors, path, metadata={"tokens": str(statistics.tokens), "crc32": _checksum(tensors)})


def load(path: Path) -> Statistics:
    """Return the statistics that `save` wrote.

    Raises:
        DataError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: must be a whole statistics file: {error}") from error
    if metadata.get("crc32") != _checksum(tensors) or not metadata.get("tokens", "").isdigit():
        raise DataError(f"{path}: must be a whole statistics file: its checksum is not the one it was written with")
    return Statistics(tokens=int(metadata["tokens"]), tensors=tensors)
