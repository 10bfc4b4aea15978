"""The pruning decision as a document: which units of each group stay. Countable and comparable without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from adasearch.documents import parse, plain, value
from adasearch.errors import ConfigError, ModelError, TrialError
from adasearch.pruning.structure import WHOLE, Group, ModelStructure, Outline
from adasearch.records import write_json
from adasearch.sections import UnitsConfig

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1


@value
class PruningPlan:
    """Kept units of every group of a model.

    Args:
        units: the kinds of units that the plan speaks of.
        keep: indices of the units that stay, ascending, by group name; over all partitions of the group.
        biases: output projections that gain a bias, in the order of their names.
        parameters: number of parameters after the cut, added biases included.
        dense_parameters: before it, and before the outline.
        outline: what was taken from the model first; the groups are those of what it left.
    """

    family: str
    units: UnitsConfig
    keep: dict[str, tuple[int, ...]]
    biases: tuple[str, ...]
    parameters: int
    dense_parameters: int
    outline: Outline = WHOLE

    @property
    def removed(self) -> float:
        """Return the fraction of all parameters that the cut removes."""
        return 1.0 - self.parameters / self.dense_parameters

    def widths(self, structure: ModelStructure) -> dict[str, int]:
        """Return the units kept per partition, by group name."""
        return {g.name: len(self.keep[g.name]) // g.partitions for g in structure.groups}

    def dense_widths(self, structure: ModelStructure) -> dict[str, int]:
        """Return the same by the group's name in the dense model, 0 for sublayers that the outline took."""
        number = structure.dense.layers
        left = {self.outline.dense_name(name, number): width for name, width in self.widths(structure).items()}
        return {g.name: left.get(g.name, 0) for g in structure.dense.groups}

    def save(self, path: Path) -> None:
        """Write the plan to `path` as JSON, atomically."""
        write_json(path, {"schema": SCHEMA, **plain(self)})

    @staticmethod
    def load(path: Path) -> PruningPlan:
        """Return the plan in the file `path`.

        Raises:
            ModelError: the file is missing, damaged or of another schema.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: must be a readable pruning plan: {error}") from error
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ModelError(f"{path}: must be a pruning plan of schema {SCHEMA}, given {schema!r}")
        try:
            return parse(PruningPlan, data, f"{path}:")
        except ConfigError as error:
            raise ModelError(str(error)) from error


Choose = Callable[[Group, "Tensor", int], tuple[int, ...]]
"""From a group, its scores (U) and a width to the units that stay, ascending, `width` of each partition."""


def highest(group: Group, scores: Tensor, width: int) -> tuple[int, ...]:
    """Return the `width` units of each partition with the highest scores; of equal ones the first stay."""
    order = (
        scores.reshape(group.partitions, group.width).argsort(dim=1, descending=True, stable=True)[:, :width].tolist()
    )
    return tuple(sorted(part * group.width + unit for part, kept in enumerate(order) for unit in kept))


def _check_scores(group: Group, scores: Tensor) -> None:
    if tuple(scores.shape) != (group.units,):
        raise ModelError(f"{group.name}: scores must be one per unit, {group.units}, given shape {tuple(scores.shape)}")
    if not bool(scores.isfinite().all()):
        raise TrialError(
            "nan", f"{group.name}: scores must be finite, {int((~scores.isfinite()).sum())} are not", "plan"
        )


def make_plan(
    structure: ModelStructure,
    units: UnitsConfig,
    scores: Mapping[str, Tensor],
    widths: Mapping[str, int],
    biases: Iterable[str] = (),
    choose: Choose = highest,
) -> PruningPlan:
    """Return the plan that keeps as many units of every group as its width says.

    Args:
        structure: what can be cut.
        units: what `structure` was described with.
        scores: one number per unit (`U`-vector) by group name, higher stays; needed for the groups that are cut.
        widths: units kept per partition by group name; groups left out stay dense.
        biases: output projections (module names) that compensation gives a bias; those that have one are ignored.
        choose: says which units of a group that is cut stay, such as `selection.chooser`; those of the highest scores.

    Raises:
        TrialError: a score is not finite.
        ModelError: scores or a width do not fit the structure.
    """
    keep: dict[str, tuple[int, ...]] = {}
    for group in structure.groups:
        width = widths.get(group.name, group.width)
        if not 1 <= width <= group.width:
            raise ModelError(f"{group.name}: width must be from 1 to {group.width}, given {width}")
        keep[group.name] = tuple(range(group.units))
        if width < group.width:
            _check_scores(group, scores[group.name])
            keep[group.name] = choose(group, scores[group.name], width)
    added = structure.added(biases)
    return PruningPlan(
        family=structure.family,
        units=units,
        keep=keep,
        biases=tuple(added),
        parameters=structure.count(widths, added),
        dense_parameters=structure.dense.parameters,
        outline=structure.outline,
    )


def check_plan(plan: PruningPlan, structure: ModelStructure) -> None:
    """Return when `plan` is one for a model of this structure.

    Raises:
        ModelError: what differs, with both values.
    """
    names = [g.name for g in structure.groups]
    given = (plan.family, plan.outline, sorted(plan.keep), plan.dense_parameters)
    wanted = (structure.family, structure.outline, sorted(names), structure.dense.parameters)
    facts = ("family", "outline", "groups", "number of dense parameters")
    for what, has, must in zip(facts, given, wanted, strict=True):
        if has != must:
            raise ModelError(f"plan: {what} must be that of the model, {_short(must)}, given {_short(has)}")
    unknown = sorted(set(plan.biases) - set(structure.output_biases))
    if unknown:
        raise ModelError(f"plan: biases must name output projections of the model, given {unknown[0]!r}")
    for group in structure.groups:
        _check_group(group, plan.keep[group.name])
    parameters = structure.count(plan.widths(structure), structure.added(plan.biases))
    if parameters != plan.parameters:
        raise ModelError(f"plan: parameters must be {parameters}, as the kept units say, given {plan.parameters}")


def _check_group(group: Group, keep: tuple[int, ...]) -> None:
    """Raise unless the kept units are ascending, in range and as many in each partition."""
    ascending = all(a < b for a, b in pairwise(keep))
    if not keep or not ascending or keep[0] < 0 or keep[-1] >= group.units:
        raise ModelError(
            f"plan: {group.name} must keep units in ascending order from 0 to {group.units - 1}, given {_short(keep)}"
        )
    counts = [sum(1 for unit in keep if unit // group.width == part) for part in range(group.partitions)]
    if len(set(counts)) > 1:
        raise ModelError(
            f"plan: {group.name} must keep equally many units of each of {group.partitions} partitions, given {counts}"
        )


def _short(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 120 else f"{text[:117]}..."
