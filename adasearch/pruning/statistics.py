"""What a calibration sample says about a model: accumulators that merge, and the frozen `Statistics` they end in.

Families of statistics (the strings that criteria, allocators and compensators name in their `needs`):

- ``moments``: mean and variance of every input feature of each group's output projection, over tokens.
- ``covariance``: the uncentred Gram matrix X^T X of the same features.
- ``votes``: norms of the same features in which every token, or every sequence, has an equal say.
- ``inputs``: mean and variance of what those matrices of each group read whose rows belong to units (q, k, v; gate,
  up).
- ``cosine``: mean over tokens of the cosine between the residual stream before and after each layer and sublayer.
- ``gradient``: W * dL/dW of each member matrix, summed per row of its cut dimension, with and without absolute value.
- ``fisher``: the same with the diagonal empirical Fisher information F, the mean over sequences of squared gradients.
- ``gradient_sum``, ``square_sum``: what the last two are read from, element by element.
- ``spsa_sum``: an estimate of the first of them from forward passes alone, one probe a sequence (`probes`).

L is the mean over sequences of the mean next-token cross-entropy: no statistic depends on how sequences are batched.
A need is a family, or ``family@corpus``: the same of a sample of that corpus, as large and drawn alike (`by_corpus`).
A family of `ACCUMULATORS` merges over samples. ``gradient`` and ``fisher`` do not, since they hold absolute values of
sums: they are read from the families of `SUMS`, which do. A new family is one accumulator class and one line there.

Shape letters: T tokens, F features of an output projection, D hidden size, R rows of a parameter along its cut
dimension.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adasearch.errors import DataError
from adasearch.pruning import products

Source = Literal["features", "sequences", "inputs", "stream", "gradient", "probes"]
"""What an accumulator is fed with: inputs of output projections, the same by sequence, what groups read, the residual
stream before and after a place (all through `of`), gradients of member matrices, or estimates of these from losses
(both built by `calibration`)."""


def _batch_mean(x: Tensor) -> Tensor:
    """Return the mean over rows (F, float64), summed in float32 for half precision, in float64 for wider types."""
    return x.mean(0, dtype=torch.float32 if x.dtype.itemsize < 4 else torch.float64).double()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Mean and sum of squared deviations `m2` of F features over `count` tokens, float64.

    Deviations are kept instead of raw squares because the variance of a feature with a large mean would cancel.
    """

    source: ClassVar[Source] = "features"
    count: int
    mean: Tensor
    m2: Tensor

    @staticmethod
    def of(x: Tensor) -> Moments:
        """Return the moments of the rows of `x` (T × F, any float type).

        Within one call half precision is summed in float32 (relative error of about 1e-6), wider types in float64.
        """
        wide = x.float() if x.dtype.itemsize < 4 else x.double()
        mean = wide.mean(0)
        deviations = wide - mean if wide is x else wide.sub_(mean)
        return Moments(count=x.shape[0], mean=mean.double(), m2=deviations.square_().sum(0).double())

    def extended(self, x: Tensor) -> Moments:
        """Return the moments of this sample and the rows of `x`."""
        return self.merge(Moments.of(x))

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
class InputMoments(Moments):
    """Moments of the features that a group reads; all its matrices whose rows belong to units read the same."""

    source: ClassVar[Source] = "inputs"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Votes:
    """Sums over a sample in which all tokens, or all sequences, count the same (F, float64).

    `token` is the sum over tokens of x_j^2 / ||x||^2, whose root is the score of GRIFFIN (arXiv 2404.01365);
    `sequence` the sum over sequences of ||x_j||_2 over their tokens, that of 2SSP (arXiv 2501.17771) up to a factor.
    """

    source: ClassVar[Source] = "sequences"
    count: int
    token: Tensor
    sequence: Tensor

    @staticmethod
    def of(x: Tensor) -> Votes:
        """Return the sums over whole sequences (B × T × F, any float type)."""
        squares = (x.float() if x.dtype.itemsize < 4 else x.double()).square()
        # A token without any activation has no direction; the smallest float gives it no vote.
        shares = squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
        sequence = squares.sum(1).sqrt().double().sum(0)
        return Votes(count=x.shape[0] * x.shape[1], token=shares.flatten(0, 1).double().sum(0), sequence=sequence)

    def extended(self, x: Tensor) -> Votes:
        """Return the sums over this sample and the sequences of `x`."""
        return self.merge(Votes.of(x))

    def merge(self, other: Votes) -> Votes:
        """Return the sums over both samples."""
        count = self.count + other.count
        return Votes(count=count, token=self.token + other.token, sequence=self.sequence + other.sequence)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Covariance:
    """Gram matrix X^T X and mean (F) over `count` tokens; `gram` is packed, float32 (`products.packed_gram`).

    In float64 it would take 0.6 GB at F = 1536 and 30 layers. Its relative error is about 1e-7 * sqrt(T), far below
    the damping (0.01 of the mean diagonal) with which it is inverted.
    """

    source: ClassVar[Source] = "features"
    count: int
    mean: Tensor
    gram: Tensor

    @staticmethod
    def of(x: Tensor) -> Covariance:
        """Return the covariance of the rows of `x` (T × F, any float type)."""
        return Covariance(count=x.shape[0], mean=_batch_mean(x), gram=products.packed_gram(x))

    def extended(self, x: Tensor) -> Covariance:
        """Return the covariance of this sample and the rows of `x`; the Gram matrix is this one, changed in place."""
        products.add_gram(self.gram, x)
        count = self.count + x.shape[0]
        mean = self.mean + (_batch_mean(x) - self.mean) * (x.shape[0] / count)
        return Covariance(count=count, mean=mean, gram=self.gram)

    def merge(self, other: Covariance) -> Covariance:
        """Return the covariance of both samples together."""
        count = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / count)
        return Covariance(count=count, mean=mean, gram=self.gram + other.gram)

    def matrix(self, *, centred: bool = False) -> Tensor:
        """Return E[x x^T] (F × F, float64), or the covariance E[x x^T] - mean mean^T when `centred`."""
        second = products.unpacked_gram(self.gram, len(self.mean)).div_(self.count)
        return second - torch.outer(self.mean, self.mean) if centred else second


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return `matrix` (F × F) plus `damping` times its mean diagonal on the diagonal.

    A sample in which every feature is zero has no scale; it gets the identity, so that nothing divides by zero.
    """
    scale = matrix.diagonal().mean()
    shift = damping * scale if scale > 0 else torch.ones_like(scale)
    return matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cosine:
    """Mean over `count` tokens (a scalar, float64) of the cosine between two states of the residual stream.

    One minus it is the block influence of ShortGPT (arXiv 2403.03853, equation 1).
    """

    source: ClassVar[Source] = "stream"
    count: int
    mean: Tensor

    @staticmethod
    def of(before: Tensor, after: Tensor) -> Cosine:
        """Return the mean cosine between the rows of `before` and `after` (T × D, any float type), in float32."""
        a, b = before.float(), after.float()
        squares = torch.linalg.vecdot(a, a) * torch.linalg.vecdot(b, b)
        # A state of zeros has no direction; the smallest float makes its cosine 0.
        cosines = torch.linalg.vecdot(a, b) / squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        return Cosine(count=before.shape[0], mean=cosines.double().mean())

    def extended(self, before: Tensor, after: Tensor) -> Cosine:
        """Return the mean over this sample and the rows of `before` and `after`."""
        return self.merge(Cosine.of(before, after))

    def merge(self, other: Cosine) -> Cosine:
        """Return the mean over both samples."""
        count = self.count + other.count
        return Cosine(count=count, mean=self.mean + (other.mean - self.mean) * (other.count / count))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientSum:
    """Sum over sequences of one parameter's gradient (its shape, float32); `count` is the number of tokens."""

    source: ClassVar[Source] = "gradient"
    count: int
    total: Tensor

    def merge(self, other: GradientSum) -> GradientSum:
        """Return the sum over both samples."""
        return dataclasses.replace(self, count=self.count + other.count, total=self.total + other.total)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpsaSum(GradientSum):
    """The same, estimated from forward passes alone: unbiased up to O(eps^2), mostly noise; see `probes`."""

    source: ClassVar[Source] = "probes"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquareSum:
    """Sum over sequences of the square of one parameter's gradient (its shape, float32)."""

    source: ClassVar[Source] = "gradient"
    count: int
    squares: Tensor

    def merge(self, other: SquareSum) -> SquareSum:
        """Return the sum over both samples."""
        return SquareSum(count=self.count + other.count, squares=self.squares + other.squares)


def gradient_rows(total: Tensor, squares: Tensor | None, weight: Tensor, dim: int, sequences: int) -> dict[str, Tensor]:
    """Return sums over each row of `weight` along `dim` (R, float64), by ``family/name``.

    With g the gradient of the mean loss and F the mean squared gradient: ``gradient/elem1`` = sum |W g|,
    ``gradient/signed`` = sum W g, ``fisher/elem2`` = sum W^2 F, ``fisher/mix`` = sum |W g - W^2 F / 2| and
    ``fisher/signed`` = sum W g (LLM-Pruner, arXiv 2305.11627, equations 3 to 5).

    Args:
        total: sum over sequences of the gradient, in the shape of `weight`.
        squares: sum of its square; None leaves ``fisher`` out.
        weight: the parameter, a matrix.
        dim: 0 or 1.
        sequences: number of them.
    """
    w = weight.float()
    first = w * total / sequences
    rows = {"gradient/elem1": first.abs(), "gradient/signed": first}
    if squares is not None:
        second = w.square() * squares / sequences
        rows |= {"fisher/elem2": second, "fisher/mix": (first - second / 2).abs(), "fisher/signed": first}
    return {name: item.sum(1 - dim, dtype=torch.float64) for name, item in rows.items()}


ACCUMULATORS: dict[str, Any] = {
    "moments": Moments,
    "covariance": Covariance,
    "votes": Votes,
    "inputs": InputMoments,
    "cosine": Cosine,
    "gradient_sum": GradientSum,
    "square_sum": SquareSum,
    "spsa_sum": SpsaSum,
}
"""Class of each family that merges; its fields other than `count` are the tensors kept for one place."""

SUMS: dict[str, frozenset[str]] = {
    "gradient": frozenset({"gradient_sum"}),
    "fisher": frozenset({"gradient_sum", "square_sum"}),
}
"""Families that are read from others, and from which."""

LARGE = frozenset({"spsa_sum"}).union(*SUMS.values())
"""Families of the size of the weights in float32."""

FAMILIES = frozenset({*ACCUMULATORS, *SUMS})
"""What criteria, allocators and compensators may need."""


def merged_from(family: str) -> frozenset[str]:
    """Return the families that merge and that `family` follows from: itself, or those of `SUMS`."""
    return SUMS.get(family, frozenset({family}))


def of_other(families: Iterable[str], corpus: str) -> frozenset[str]:
    """Return needs of the same families on the sample of `corpus`; those that name a corpus already keep theirs."""
    return frozenset(need if "@" in need else f"{need}@{corpus}" for need in families)


def by_corpus(needs: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the families in `needs` by the corpus that they name; those of the trial's own sample under ``""``.

    >>> by_corpus(["moments", "fisher@stdlib"])
    {'': frozenset({'moments'}), 'stdlib': frozenset({'fisher'})}
    """
    split = [need.partition("@") for need in sorted(needs)]
    corpora = ["", *sorted({corpus for _, _, corpus in split} - {""})]
    return {corpus: frozenset(family for family, _, of in split if of == corpus) for corpus in corpora}


def tensors_of(family: str, place: str, value: Any) -> dict[str, Tensor]:
    """Return what an accumulator holds for one place under the keys of `Statistics`, on the CPU."""
    names = (f.name for f in dataclasses.fields(value) if f.name != "count")
    return {f"{family}/{place}/{name}": getattr(value, name).cpu() for name in names}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of one calibration sample, on the CPU.

    Args:
        tokens: number of tokens that the moments and Gram matrices were taken over.
        tensors: ``family/place/name`` -> tensor, where place is a module (a layer or sublayer for the cosine, an
            output projection for moments and covariance) or a parameter.
        others: statistics of the samples of other corpora, by corpus, where something needs them.
    """

    tokens: int
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Statistics] = field(default_factory=dict)

    @property
    def families(self) -> frozenset[str]:
        """Return the families that are held."""
        return frozenset(key.split("/", 1)[0] for key in self.tensors)

    def value(self, family: str, place: str) -> Any:
        """Return the accumulator of a family of `ACCUMULATORS` at one place."""
        made = ACCUMULATORS[family]
        names = [f.name for f in dataclasses.fields(made) if f.name != "count"]
        return made(count=self.tokens, **{name: self.tensors[f"{family}/{place}/{name}"] for name in names})

    def moments(self, module: str) -> Moments:
        """Return the moments of the input features of `module`."""
        found: Moments = self.value("moments", module)
        return found

    def covariance(self, module: str) -> Covariance:
        """Return the covariance of the input features of `module`."""
        found: Covariance = self.value("covariance", module)
        return found

    def votes(self, module: str) -> Votes:
        """Return the sums of the input features of `module` in which tokens, or sequences, count the same."""
        found: Votes = self.value("votes", module)
        return found

    def inputs(self, group: str) -> Moments:
        """Return the moments of the features that the matrices of a group read whose rows belong to units."""
        found: Moments = self.value("inputs", group)
        return found

    def cosine(self, place: str) -> float:
        """Return the mean cosine between the residual stream before and after a layer or sublayer (module path)."""
        return float(self.value("cosine", place).mean)

    def rows(self, family: str, parameter: str, name: str) -> Tensor:
        """Return a sum over each row (R) of `parameter`; `family` and `name` as in `gradient_rows`."""
        return self.tensors[f"{family}/{parameter}/{name}"]

    def of_corpus(self, corpus: str) -> Statistics:
        """Return the statistics of the sample of another corpus, which know the others too."""
        return dataclasses.replace(self.others[corpus], others=self.others)

    def only(self, family: str) -> Statistics:
        """Return the part that belongs to one family."""
        part = {key: item for key, item in self.tensors.items() if key.startswith(f"{family}/")}
        return Statistics(tokens=self.tokens, tensors=part)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of two samples together: of families of `ACCUMULATORS`, the same in both.

    The rows of ``gradient`` and ``fisher`` do not merge, as sums of |W g| of two samples do not follow from those of
    each; the families that they are read from do.
    """
    assert a.families == b.families <= set(ACCUMULATORS), f"cannot merge {a.families} with {b.families}"
    tensors: dict[str, Tensor] = {}
    for family, place in dict.fromkeys(tuple(key.split("/")[:2]) for key in a.tensors):
        both = a.value(family, place).merge(b.value(family, place))
        tensors |= tensors_of(family, place, both)
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
        content = tensors[name].contiguous().view(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))  # type: ignore[arg-type] # numpy has buffers
    return f"{value:08x}"


def save(statistics: Statistics, path: Path) -> None:
    """Write `statistics` to the safetensors file `path` (not atomically: see `statistics_cache`)."""
    tensors = {name: item.contiguous() for name, item in statistics.tensors.items()}
    save_file(tensors, path, metadata={"tokens": str(statistics.tokens), "crc32": _checksum(tensors)})


def load(path: Path, *, verify: bool = True) -> Statistics:
    """Return the statistics that `save` wrote, mapped into memory.

    Args:
        path: the file.
        verify: whether to read all of it (about 3 GB a second) and compare its checksum.

    Raises:
        DataError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: torch's own, of a file deleted meanwhile
        raise DataError(f"{path}: must be a whole statistics file: {error}") from error
    if not metadata.get("tokens", "").isdigit() or (verify and metadata.get("crc32") != _checksum(tensors)):
        raise DataError(f"{path}: must be a whole statistics file: its checksum is not the one it was written with")
    return Statistics(tokens=int(metadata["tokens"]), tensors=tensors)
