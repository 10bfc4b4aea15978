"""Which units stay, learnt while a model is trained with gates on its units: the two sides of it that meet here.

A `Learner` says, step by step, by what every unit is multiplied, and looks at the gradients. Who trains asks it, knows
nothing of units, and is told by the options alone what else to train. So what is pruned stays apart from how models
are tuned, and whatever the training loop can do (distillation, adapters, half precision) every learner can have.

Shape letters: U units of a group, R rank, M outputs and K inputs of a projection.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from adasearch.documents import Count, NonNegative, Positive, Share, value
from adasearch.errors import ConfigError
from adasearch.sections import Dropout, TuningOptions


@value
class LearningOptions(TuningOptions):
    """Settings of every schedule that learns, beside those of all that train.

    Args:
        prior: how much the criterion's scores count at the start; 0 begins without any, and equal scores are then told
            apart by the order of the units.
    """

    tokens: Count = 32768
    prior: NonNegative = 0.5


@value
class RampOptions(LearningOptions):
    """Settings of those that mask more and more units on their way, and tune weights meanwhile.

    Args:
        begin: share of the steps before any unit is masked.
        end: share of the steps after which as many are masked as must go; above `begin`.
        every: steps after which masks are chosen anew.
        alpha: an update of rank R counts `alpha` / R times.
        dropout: share of an update's inputs that is dropped while training.
    """

    begin: Share = 0.1
    end: Share = 0.9
    every: Count = 4
    alpha: Positive = 16.0
    dropout: Dropout = 0.0

    def __post_init__(self) -> None:
        """Refuse a ramp without a length."""
        TuningOptions.__post_init__(self)
        if self.begin >= self.end:
            raise ValueError(f"begin must be below end, {self.end:g}")

    def part(self, done: float) -> float:
        """Return the part of what must go that is masked once the share `done` of the steps is made, from 0 to 1.

        It is 1 - (1 - (t - b) / (e - b))^3 from b to e: the cubic ramp of Zhu and Gupta (arXiv 1710.01878), as
        LoRAPrune (arXiv 2305.18403) and movement pruning (arXiv 2005.07683) take it.
        """
        return 1.0 - (1.0 - min(1.0, max(0.0, (done - self.begin) / (self.end - self.begin)))) ** 3


class Ranked(Protocol):
    """Options of what trains low-rank updates."""

    @property
    def rank(self) -> int:
        """Return the rank of each update."""


def check_rank(options: Ranked, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that projections can have updates of the rank that is asked for.

    Args:
        options: with a `rank`.
        shapes: M × K of every projection that gets one, by module path.

    Raises:
        ConfigError: names the setting.
    """
    least = min(shapes, key=lambda name: min(shapes[name]))
    if options.rank > min(shapes[least]):
        problem = f"must be at most {min(shapes[least])}, the smaller side of {least}, given {options.rank}"
        raise ConfigError("rank", problem)


class LowRank(Protocol):
    """A low-rank update of one projection, ``scale`` b a (a is R × K, b is M × R), after a backward pass."""

    @property
    def a(self) -> Tensor:
        """Return the first factor."""

    @property
    def b(self) -> Tensor:
        """Return the second factor."""

    @property
    def scale(self) -> float:
        """Return how often the update counts."""


class Learner(abc.ABC):
    """What a schedule makes of each step of a training."""

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained beside weights, float32 and of one dimension each."""
        return []

    @abc.abstractmethod
    def gates(self, done: float) -> Mapping[str, Tensor]:
        """Return the factors of units (U, float32) by name of their group in the next forward; others count whole.

        It is asked once for every step, and once at the end, for the factors that become part of the weights.

        Args:
            done: share of the steps that are made.
        """

    def penalty(self) -> Tensor | None:
        """Return what the next step adds to the loss (float32 scalar), None for nothing."""
        return None

    def graded(self, updates: Mapping[str, LowRank]) -> None:  # noqa: B027 - not all need look
        """Look at gradients after the backward pass and before the optimizer; nothing here.

        Args:
            updates: by module path, their factors with gradients; empty where none are trained.
        """
