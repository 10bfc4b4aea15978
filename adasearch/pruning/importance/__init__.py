"""Importance criteria: one file each.

An entry is ``score(view: GroupView, options) -> Tensor`` of U float32 or float64 scores, higher = keep. Its fact
`needs` is a function ``options -> frozenset[str]``: the families of `Statistics` that the score reads, as
``family@corpus`` where they are those of another corpus, which an option called ``corpus`` must name: so it is checked
before any work. A criterion sees one group at a time, whatever kind of layer it comes from.

Shape letters: U units of a group, B input features of the output projection per unit, D output features of it,
K elements of one unit in one matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic
import torch
from torch import Tensor

from adasearch.config import Component
from adasearch.config import component as parsed
from adasearch.documents import fingerprint
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning.accumulators import Covariance, Moments, Votes
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import Group, ModelStructure, Slice
from adasearch.registry import IMPORTANCE

Probe = Literal["all", "output"]
Gradient = Literal["mean", "rms", "spsa"]
"""Size of a gradient over sequences: absolute value of the ``mean``, root of the mean square (``rms``), or the first
estimated from forward passes alone (``spsa``), which is mostly noise: see `probes`."""
GRADIENTS: dict[Gradient, str] = {"mean": "gradient_sum", "rms": "square_sum", "spsa": "spsa_sum"}
"""The family of statistics that holds each."""


def _criterion(data: Any) -> Component:
    if isinstance(data, Component):
        return data
    try:
        return parsed(IMPORTANCE, data, "")
    except ConfigError as error:
        raise ValueError(str(error)) from error  # which `parse` gives its place in the file


Criterion = Annotated[Component, pydantic.PlainValidator(_criterion)]
"""A setting that is itself a criterion: a name, or a mapping with the key ``type``."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupView:
    """What a criterion may look at: one group, its weights by unit, its statistics and a seed.

    Args:
        group: whose units are scored.
        weights: parameters of the dense model by full name.
        statistics: holds at least what the criterion needs; None where it needs nothing.
        seed: of the trial.
    """

    group: Group
    weights: Mapping[str, Tensor]
    statistics: Statistics | None
    seed: int

    def of_corpus(self, corpus: str) -> GroupView:
        """Return the view on the same group whose statistics are those of another corpus."""
        return dataclasses.replace(self, statistics=self._known().of_corpus(corpus))

    def members(self, probe: Probe = "all") -> tuple[str, ...]:
        """Return the matrices that units own parts of, in the order of the slices: all, or the output's only."""
        output = f"{self.group.output}.weight"
        if probe == "output":
            return (output,)
        return tuple(s.parameter for s in self.group.slices if self.weights[s.parameter].ndim == 2)

    def weight(self, parameter: str) -> Tensor:
        """Return the part of a matrix that each unit owns (U × K, float32)."""
        return self.rows_of(parameter).flatten(1)

    def rows_of(self, parameter: str) -> Tensor:
        """Return the same by row of the cut dimension (U × rows per unit × elements per row, float32)."""
        return self._rows(parameter, self.weights[parameter])

    def output_weight(self) -> Tensor:
        """Return the columns of the output projection by unit (U × B × D, float32)."""
        return self.rows_of(f"{self.group.output}.weight")

    def gradients(self, parameter: str, over: Gradient) -> Tensor:
        """Return the size of the gradients of the weights in `rows_of`, up to a factor that all units share."""
        if over != "rms":
            return self._rows(parameter, self._known().value(GRADIENTS[over], parameter).total).abs()
        return self._rows(parameter, self._known().value("square_sum", parameter).squares).sqrt()

    def norms(self, parameter: str) -> Tensor:
        """Return sqrt(E[x^2]) of what the elements in `rows_of` are multiplied with, in a shape that multiplies them.

        That is U × B × 1 (float64) for the output projection, 1 × 1 × elements per row for the others.
        """
        if parameter == f"{self.group.output}.weight":
            return self.feature(self.moments().second_moment).sqrt()[..., None]
        return self._known().inputs(self.group.name).second_moment.sqrt()[None, None]

    def moments(self) -> Moments:
        """Return the moments of the units' activations (U·B features); `feature` shapes them by unit."""
        return self._known().moments(self.group.output)

    def covariance(self) -> Covariance:
        """Return the covariance of the units' activations (U·B features)."""
        return self._known().covariance(self.group.output)

    def votes(self) -> Votes:
        """Return the sums of the units' activations (U·B features) in which tokens, or sequences, count the same."""
        return self._known().votes(self.group.output)

    def feature(self, values: Tensor) -> Tensor:
        """Return one value per input feature of the output projection (U·B) by unit (U × B)."""
        return values.view(self.group.units, self.group.output_block)

    def statistic(self, family: str, parameter: str, name: str) -> Tensor:
        """Return sums over rows of a matrix, by unit (U × rows per unit, float64); names as in `gradient_rows`."""
        rows = self._known().rows(family, parameter, name)
        return rows.view(self.group.units, self._slice(parameter).block)

    def generator(self) -> torch.Generator:
        """Return a random generator that depends on the seed and the group alone, not on the order of groups."""
        seed = int(fingerprint([self.seed, self.group.name]), 16) % 2**63
        return torch.Generator().manual_seed(seed)

    def _rows(self, parameter: str, matrix: Tensor) -> Tensor:
        part = self._slice(parameter)
        return matrix.movedim(part.dim, 0).reshape(self.group.units, part.block, -1).float()

    def _slice(self, parameter: str) -> Slice:
        return next(s for s in self.group.slices if s.parameter == parameter)

    def _known(self) -> Statistics:
        assert self.statistics is not None, "this criterion must be given statistics"
        return self.statistics


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that a criterion with these options reads."""
    found: frozenset[str] = IMPORTANCE.get(component.type).facts["needs"](component.options)
    return found


def score_by(component: Component, view: GroupView) -> Tensor:
    """Return what one criterion makes of a group (U, float64): for criteria that are built from others."""
    scores: Tensor = IMPORTANCE.get(component.type).function(view, component.options)
    return scores.double()


def score_all(
    structure: ModelStructure,
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    component: Component,
    seed: int,
) -> dict[str, Tensor]:
    """Return one score per unit (U, float32, higher = keep) for each group, by group name.

    Raises:
        TrialError: a score is not finite (kind ``nan``).
    """
    entry = IMPORTANCE.get(component.type)
    scores = {}
    for group in structure.groups:
        view = GroupView(group=group, weights=weights, statistics=statistics, seed=seed)
        with torch.no_grad():
            scores[group.name] = _checked(entry.function(view, component.options), group, component)
    return scores


def _checked(scores: Any, group: Group, component: Component) -> Tensor:
    assert scores.shape == (group.units,), f"{component.type} gave {tuple(scores.shape)} scores for {group.units} units"
    single: Tensor = scores.float().cpu()
    if not bool(torch.isfinite(single).all()):
        raise TrialError("nan", f"{component.type} scores of {group.name} must be finite", "score")
    return single
