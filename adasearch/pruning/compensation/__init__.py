"""Compensations: one file each.

An entry is ``compensate(model: nn.Module, context: CompensationContext, options) -> None``: it changes the output
projections of a model that was just cut, so that they make up for the units that are gone. Facts, both functions of
the options: `needs`, the families of `Statistics` read, and `adds_bias`, whether output projections get a bias (the cut
makes it, filled with zeros).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adasearch.config import Component
from adasearch.errors import TrialError
from adasearch.pruning.plan import PruningPlan
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import Group, ModelStructure
from adasearch.registry import COMPENSATION


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompensationContext:
    """What a compensation may look at.

    Args:
        structure: the groups of the dense model.
        plan: which units stay.
        statistics: of the dense model, at least what the compensation needs; None where it needs nothing.
        weights: parameters of the dense model by full name.
    """

    structure: ModelStructure
    plan: PruningPlan
    statistics: Statistics | None
    weights: Mapping[str, Tensor]

    def cuts(self, model: nn.Module) -> Iterator[Cut]:
        """Return the output projections of `model` that lost input features, one after the other."""
        assert self.statistics is not None, "this compensation must be given statistics"
        for group in self.structure.groups:
            kept = self.plan.keep[group.name]
            if len(kept) < group.units:
                yield Cut(group=group, kept=kept, module=model.get_submodule(group.output), context=self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cut:
    """One output projection after the cut: `module` has the columns of the kept units, F features before, S after."""

    group: Group
    kept: tuple[int, ...]
    module: nn.Module
    context: CompensationContext

    @property
    def statistics(self) -> Statistics:
        """Return the statistics of the dense model."""
        assert self.context.statistics is not None
        return self.context.statistics

    @property
    def device(self) -> torch.device:
        """Return where the module lives; solving happens there."""
        return self.weight.device

    @property
    def weight(self) -> Tensor:
        """Return the module's weight (D × S), to be written into."""
        assert isinstance(self.module.weight, Tensor)
        return self.module.weight

    def dense_weight(self) -> Tensor:
        """Return the weight before the cut (D × F, float64)."""
        return self.context.weights[f"{self.group.output}.weight"].to(self.device, torch.float64)

    def stays(self) -> Tensor:
        """Return which of the F input features stay (bool)."""
        units = torch.zeros(self.group.units, dtype=torch.bool, device=self.device)
        units[list(self.kept)] = True
        return units.repeat_interleave(self.group.output_block)

    def add_bias(self, shift: Tensor) -> None:
        """Add `shift` (D) to the module's bias.

        Raises:
            TrialError: it is not finite (kind ``nan``).
        """
        bias = self.module.bias
        assert isinstance(bias, Tensor), (
            f"{self.group.output} must have a bias: the plan lists {self.context.plan.biases}"
        )
        bias.copy_(self._finite(bias.double() + shift))

    def set_weight(self, weight: Tensor) -> None:
        """Replace the module's weight (D × S).

        Raises:
            TrialError: it is not finite (kind ``nan``).
        """
        self.weight.copy_(self._finite(weight))

    def _finite(self, tensor: Tensor) -> Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise TrialError("nan", f"the compensation of {self.group.output} must be finite", "compensate")
        return tensor


def needs(component: Component) -> frozenset[str]:
    """Return the families of statistics that a compensation with these options reads."""
    found: frozenset[str] = COMPENSATION.get(component.type).facts["needs"](component.options)
    return found


def bias_modules(component: Component, structure: ModelStructure) -> tuple[str, ...]:
    """Return the output projections that must have a bias after the cut: all of them or none.

    All, because a model's config says once for every layer whether there is one.
    """
    adds = COMPENSATION.get(component.type).facts["adds_bias"](component.options)
    return tuple(sorted(structure.output_biases)) if adds else ()


def apply(
    model: nn.Module,
    structure: ModelStructure,
    plan: PruningPlan,
    statistics: Statistics | None,
    weights: Mapping[str, Tensor],
    component: Component,
) -> None:
    """Compensate `model`, which was just cut by `plan`, in place; `weights` of the dense model are only read.

    Raises:
        TrialError: the result is not finite (kind ``nan``).
    """
    context = CompensationContext(structure=structure, plan=plan, statistics=statistics, weights=weights)
    with torch.no_grad():
        COMPENSATION.get(component.type).function(model, context, component.options)
