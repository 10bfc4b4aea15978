"""Accumulators of a calibration sample: fed batch by batch, merged over samples, frozen in between.

Shape letters: T tokens, F features of an output projection, D hidden size, L layers, R rows of a parameter along its
cut dimension.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from adasearch.pruning import products

Source = Literal["features", "sequences", "inputs", "stream", "boundaries", "gradient", "probes"]
"""What an accumulator is fed with: inputs of output projections, the same by sequence, what groups read, the residual
stream around a place or at all layer boundaries (all through `of`), gradients of matrices or estimates of these from
losses (both by `calibration`)."""


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
class Boundaries:
    """Means over `count` tokens of the cosine and angle between states of the residual stream (both B × B, float64).

    The B = L + 1 boundaries lie before each of the L layers and after the last one. The angle is arccos(cosine) / pi.
    """

    source: ClassVar[Source] = "boundaries"
    count: int
    cosine: Tensor
    angle: Tensor

    @staticmethod
    def of(states: Tensor) -> Boundaries:
        """Return the means over the tokens of `states` (T × B × D, any float type), in float32."""
        units = torch.nn.functional.normalize(states.float(), dim=-1, eps=torch.finfo(torch.float32).tiny)
        cosines = units @ units.mT
        angles = cosines.clamp(-1, 1).arccos() / torch.pi
        return Boundaries(count=len(states), cosine=cosines.double().mean(0), angle=angles.double().mean(0))

    def extended(self, states: Tensor) -> Boundaries:
        """Return the means over this sample and the tokens of `states`."""
        return self.merge(Boundaries.of(states))

    def merge(self, other: Boundaries) -> Boundaries:
        """Return the means over both samples."""
        count = self.count + other.count
        pairs = ((self.cosine, other.cosine), (self.angle, other.angle))
        cosine, angle = (a + (b - a) * (other.count / count) for a, b in pairs)
        return Boundaries(count=count, cosine=cosine, angle=angle)


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
