"""Relative pruning ratios -> widths that meet the parameter budget, by arithmetic on the structure alone.

A group moves along a *ladder*: level 0 is its dense width, each further level the next smaller width that is allowed
(multiples of `BudgetConfig.multiple_of` for MLPs, every width for attention), the last one the smallest. Where all
layers get the same widths (`BudgetConfig.uniform`), the groups of a kind move along one ladder together, which leaves
out the widths that the family's stock class refuses.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from adasearch.errors import ConfigError
from adasearch.pruning.structure import Group, ModelStructure
from adasearch.sections import BudgetConfig

_LEAST_RATIO = 1e-9  # of the largest; below it the scale that fills a group would overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ladder:
    """The widths that groups take together: the dense one, then falling; `ratio` in (0, 1] is relative."""

    groups: tuple[Group, ...]
    ratio: float
    widths: tuple[int, ...]

    @property
    def levels(self) -> int:
        """Return the index of the last level, 0 where the groups cannot move."""
        return len(self.widths) - 1

    @property
    def price(self) -> int:
        """Return the number of parameters that go with one unit per partition of every group."""
        return sum(group.step_cost for group in self.groups)

    def removed(self, level: int) -> int:
        """Return the number of units per partition that are gone at a level."""
        return self.widths[0] - self.widths[level]

    def floor(self, units: float) -> int:
        """Return the last level at which no more than `units` are gone."""
        # A hair of slack: a ratio of k / width must come back as k units.
        return bisect.bisect_right(range(len(self.widths)), units + 1e-9, key=self.removed) - 1

    def cost(self, level: int) -> int:
        """Return the number of parameters that go on the step from the level before to `level`."""
        return (self.removed(level) - self.removed(level - 1)) * self.price

    def wanted(self, scale: float) -> float:
        """Return the units, not rounded, that go at a scale of the ratios."""
        return min(scale * self.ratio * self.widths[0], float(self.removed(self.levels)))

    def scale(self, level: int) -> float:
        """Return the scale of the ratios at which `level` is reached."""
        return self.removed(level) / (self.ratio * self.widths[0])

    @property
    def spread(self) -> float:
        """Return a number in [0, 1) by which equal claims of neighbouring layers are told apart (van der Corput).

        Whatever number of layers comes first in this order, they lie spread over the depth.
        """
        return int(f"{self.groups[0].layer:032b}"[::-1], 2) / 2**32


def _base(structure: ModelStructure, budget: BudgetConfig) -> int:
    """Return the number of parameters that the fraction `budget.remove` is of."""
    dense = structure.dense
    return dense.parameters - (dense.embedding_parameters if budget.of == "non_embedding" else 0)


def removal(structure: ModelStructure, budget: BudgetConfig, biases: Iterable[str] = ()) -> int:
    """Return how many parameters must be cut at least, those that added `biases` (module names) cost included.

    What the outline of the structure has removed already counts; it may be more than enough, see `project`.
    """
    # The decimal that the user wrote, not the nearest double: 0.2 of 10 parameters is 2, not 3.
    exact = Fraction(str(budget.fraction)) * _base(structure, budget)
    gone = structure.dense.parameters - structure.parameters
    return math.ceil(exact) - gone + sum(structure.added(biases).values())


def _widths(structure: ModelStructure, group: Group, budget: BudgetConfig) -> tuple[int, ...]:
    """Return the widths that a group may take, the dense one first, then falling."""
    step = budget.multiple_of if group.kind == "mlp" else 1
    found = range((group.width - 1) // step * step, 0, -step)
    stock = structure.stock_widths.get(group.kind) if budget.uniform else None
    return (group.width, *(width for width in found if stock is None or width in stock))


def _together(structure: ModelStructure, budget: BudgetConfig) -> list[tuple[Group, ...]]:
    """Return the groups that share a width: each alone, or all of a kind.

    Raises:
        ConfigError: layers that are to share a width have different ones before any cut.
    """
    if not budget.uniform:
        return [(group,) for group in structure.groups]
    by_kind: dict[str, list[Group]] = {}
    for group in structure.groups:
        by_kind.setdefault(group.kind, []).append(group)
    for kind, groups in by_kind.items():
        widths = sorted({group.width for group in groups})
        if len(widths) > 1:
            problem = f"needs a model whose layers are equally wide, {kind} widths are {widths[0]} to {widths[-1]}"
            raise ConfigError("budget.uniform", problem)
    return [tuple(groups) for groups in by_kind.values()]


def _mean(groups: tuple[Group, ...], ratios: Mapping[str, float]) -> float:
    """Return the mean ratio of groups, each weighing as much as it has parameters: together they ask for as many."""
    sizes = [group.width * group.step_cost for group in groups]
    total = sum(size * ratios.get(group.name, 0.0) for size, group in zip(sizes, groups, strict=True))
    return total / sum(sizes) if len(groups) > 1 else ratios.get(groups[0].name, 0.0)


def _ladders(structure: ModelStructure, ratios: Mapping[str, float], budget: BudgetConfig) -> list[_Ladder]:
    """Return the ladders of the groups that may move."""
    claims = [(groups, _mean(groups, ratios)) for groups in _together(structure, budget)]
    top = max((ratio for _, ratio in claims), default=0.0)
    ladders = [
        _Ladder(groups=groups, ratio=max(ratio / top, _LEAST_RATIO), widths=_widths(structure, groups[0], budget))
        for groups, ratio in claims
        if ratio > 0
    ]
    return [ladder for ladder in ladders if ladder.levels]


def _most(ladders: Iterable[_Ladder]) -> int:
    return sum(ladder.removed(ladder.levels) * ladder.price for ladder in ladders)


def _fraction(structure: ModelStructure, budget: BudgetConfig, biases: Iterable[str], most: int) -> float:
    gone = structure.dense.parameters - structure.parameters
    left = gone + most - sum(structure.added(biases).values())
    return max(0, math.floor(10_000 * left / _base(structure, budget))) / 10_000


def reachable(structure: ModelStructure, budget: BudgetConfig, biases: Iterable[str] = ()) -> float:
    """Return the greatest `budget.remove` that can be met when every group may move, rounded down to 4 decimals."""
    dense = dict.fromkeys(structure.dense_widths(), 1.0)
    return _fraction(structure, budget, biases, _most(_ladders(structure, dense, budget)))


def on_budget(structure: ModelStructure, ratios: Mapping[str, float], need: float) -> dict[str, float]:
    """Return the fraction of each group, by name, that goes where units can be split and `need` parameters go in all.

    Those are the ratios times one scale, as far as no group loses its last unit; where even that is not enough, it is
    what comes nearest.
    """
    ladders = _ladders(structure, ratios, BudgetConfig(remove=0.5))  # every width is allowed, whatever goes
    found = dict.fromkeys(structure.dense_widths(), 0.0)
    if ladders and need > 0:
        scale = _scale(ladders, need)
        found |= {x.groups[0].name: x.wanted(scale) / x.groups[0].width for x in ladders}
    return found


def _left(structure: ModelStructure, widths: Mapping[str, int]) -> ModelStructure:
    """Return the structure of the model that is left at `widths`, as far as counting goes."""
    groups = tuple(dataclasses.replace(g, units=widths[g.name] * g.partitions) for g in structure.groups)
    return dataclasses.replace(structure, groups=groups)


def project(
    structure: ModelStructure,
    ratios: Mapping[str, float],
    budget: BudgetConfig,
    biases: Iterable[str] = (),
    since: Mapping[str, int] | None = None,
    part: float = 1.0,
) -> dict[str, int]:
    """Return the width of every group, units kept per partition, by group name.

    The ratios are multiplied by the one scale at which they would remove just enough if units could be split, no group
    losing its last unit; rounded down; then the largest remainders go while they fit, then the cheapest steps. So the
    model has at most the parameters that the budget leaves; what it has less would not pay for undoing any step. With
    uniform widths a step is a unit of every layer at once, and the ratio of a kind the mean of its groups' ratios.

    Args:
        structure: the groups and their costs.
        ratios: relative fraction of units removed (>= 0) by group name; groups of ratio 0, or left out, stay dense.
        budget: what must go. MLP widths are multiples of `multiple_of`, or dense.
        biases: output projections (module names) that compensation gives a bias; what they cost is cut as well.
        since: widths of a model that is partly cut; ratios are fractions of these, and none rises. None is dense.
        part: of what must go, in (0, 1]; what is gone already counts.

    Raises:
        ConfigError: no widths meet the budget; the message holds the greatest fraction that can be met. Or widths shall
            be uniform, and there are biases to add, or the widths of the dense model differ.
    """
    biases, since = tuple(biases), since or structure.dense_widths()
    if budget.uniform and structure.added(biases):
        problem = "leaves no room for a compensation that adds biases, which stock classes lack; take one that does not"
        raise ConfigError("budget.uniform", problem)
    gone = structure.parameters - structure.count(since)
    need = math.ceil(removal(structure, budget, biases) * part) - gone
    ladders = _ladders(_left(structure, since), ratios, budget)
    if need > _most(ladders):
        most = _fraction(structure, budget, biases, gone + _most(ladders))
        still = len(structure.groups) - sum(len(ladder.groups) for ladder in ladders)
        which = f" while {still} of {len(structure.groups)} groups stay dense" if still else ""
        raise ConfigError("budget.remove", f"must be at most {most:.4f} for this model{which}, given {budget.remove}")
    levels = _round(ladders, need)
    widths = dict(since)
    for ladder, level in zip(ladders, levels, strict=True):
        widths |= dict.fromkeys((group.name for group in ladder.groups), ladder.widths[level])
    return widths


def _scale(ladders: list[_Ladder], need: float) -> float:
    """Return the least scale at which the ratios remove `need` parameters, by bisection."""
    low, high = 0.0, max(ladder.scale(ladder.levels) for ladder in ladders)
    for _ in range(80):
        middle = (low + high) / 2
        enough = sum(ladder.wanted(middle) * ladder.price for ladder in ladders) >= need
        low, high = (low, middle) if enough else (middle, high)
    return high


def _round(ladders: list[_Ladder], need: int) -> list[int]:
    """Return the level of each ladder at which at least `need` parameters are gone, and hardly more."""
    if need <= 0:
        return [0] * len(ladders)
    scale = _scale(ladders, need)
    wanted = [ladder.wanted(scale) for ladder in ladders]
    levels = [ladder.floor(units) for ladder, units in zip(ladders, wanted, strict=True)]
    missing = need - sum(x.removed(level) * x.price for x, level in zip(ladders, levels, strict=True))
    missing = _take_remainders(ladders, wanted, levels, missing)
    missing = _take_cheapest(ladders, levels, missing)
    _give_back(ladders, levels, -missing)
    return levels


def _take_remainders(ladders: list[_Ladder], wanted: list[float], levels: list[int], missing: int) -> int:
    """Move groups one level, largest remainder first, where the step is no more than what is missing."""

    def claim(i: int) -> tuple[float, float, int]:
        ladder, level = ladders[i], levels[i]
        gap = ladder.removed(level + 1) - ladder.removed(level)
        return (-(wanted[i] - ladder.removed(level)) / gap, ladder.spread, i)

    for i in sorted((i for i, ladder in enumerate(ladders) if levels[i] < ladder.levels), key=claim):
        cost = ladders[i].cost(levels[i] + 1)
        if cost <= missing:
            levels[i] += 1
            missing -= cost
    return missing


def _take_cheapest(ladders: list[_Ladder], levels: list[int], missing: int) -> int:
    """Take the cheapest steps until nothing is missing, in the order in which a growing scale reaches them."""

    def step(i: int) -> tuple[int, float, float, int]:
        ladder, level = ladders[i], levels[i] + 1
        return (ladder.cost(level), ladder.scale(level), ladder.spread, i)

    queue = [step(i) for i, ladder in enumerate(ladders) if levels[i] < ladder.levels]
    heapq.heapify(queue)
    while missing > 0:
        cost, _, _, i = heapq.heappop(queue)
        levels[i] += 1
        missing -= cost
        if levels[i] < ladders[i].levels:
            heapq.heappush(queue, step(i))
    return missing


def _give_back(ladders: list[_Ladder], levels: list[int], spare: int) -> None:
    """Undo the dearest steps that `spare` parameters pay for, the last that the scale reached first."""
    while True:
        steps = [(x.cost(levels[i]), x.scale(levels[i]), -i) for i, x in enumerate(ladders) if levels[i]]
        cost, _, index = max((step for step in steps if step[0] <= spare), default=(0, 0.0, 0))
        if not cost:
            return
        levels[-index] -= 1
        spare -= cost
