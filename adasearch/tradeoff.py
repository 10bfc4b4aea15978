"""What a search for several objectives found, from its records: the front, its knees, and who is finished. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from adasearch.config import TrialResult
from adasearch.documents import value
from adasearch.pareto import Bargain, Knee, bargain, front, hypervolume, knee, normalised, spread
from adasearch.records import DENSE, Record
from adasearch.sections import ObjectiveConfig

LOSSES = (0.01, 0.02, 0.05)
"""Losses of the score that a cheapest model is named for."""


@value
class Tradeoff:
    """What is had for what, among trials that were scored in full and keep all hard limits.

    Args:
        costs: that were minimised.
        records: the trials of the front, the cheapest first by the first cost.
        beyond: numbers of the trials that break a hard limit.
        volume: that the front dominates, as a share of the box between the worst and the best of each objective.
        knees: by cost, the number of the trial where score against that cost bends most.
        bargains: by cost, the cheapest trials that lose at most so much, by number.
        against: what their loss is counted from: ``dense`` or ``best``.
    """

    costs: tuple[str, ...]
    records: tuple[Record, ...]
    beyond: tuple[int, ...]
    volume: float
    knees: dict[str, tuple[int, Knee]]
    bargains: dict[str, tuple[tuple[int, Bargain], ...]]
    against: str

    @property
    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of the trials on the front."""
        return tuple(record.number for record in self.records)

    def roles(self, number: int) -> list[str]:
        """Return what a trial of the front is, in words."""
        words = [f"knee in {cost}" for cost, (other, _) in self.knees.items() if other == number]
        for cost, found in self.bargains.items():
            for other, deal in found:
                if other == number:
                    words.append(f"least {cost} at a loss of at most {100 * deal.allowed:g} points")
        return words


def result_of(record: Record) -> TrialResult:
    """Return the result of a record that has one."""
    assert record.result is not None
    return record.result


def complete(records: Sequence[Record]) -> list[Record]:
    """Return the trials that were scored in full, by number, each configuration once; the dense model is none."""
    full = [r for r in records if r.number != DENSE and r.result is not None and not r.result.stopped]
    ordered = sorted(full, key=lambda r: r.number, reverse=True)
    return sorted({str(r.config): r for r in ordered}.values(), key=lambda r: r.number)


def values_of(objective: ObjectiveConfig, records: Sequence[Record]) -> np.ndarray:
    """Return what is maximised (N×m): the score, and each cost as a fraction of the dense model's with a minus."""
    rows = [[r.score, *(-r.shares[cost] for cost in objective.also)] for r in map(result_of, records)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), 1 + len(objective.also))


def tradeoff(objective: ObjectiveConfig, records: Sequence[Record], dense: TrialResult | None) -> Tradeoff | None:
    """Return what a search for several objectives found; None for one objective, or before a trial keeps all limits.

    Args:
        objective: of the study.
        records: of its trials, one or more of each.
        dense: what the dense model scored, None where that is not known.
    """
    if not objective.several:
        return None
    found = complete(records)
    kept = [record for record in found if objective.admits(result_of(record).shares)]
    if not kept:
        return None
    values = values_of(objective, kept)
    members = sorted(front(values), key=lambda i: (-values[i, 1], kept[i].number))
    chosen = [kept[i] for i in members]
    knees: dict[str, tuple[int, Knee]] = {}
    bargains: dict[str, tuple[tuple[int, Bargain], ...]] = {}
    reference, against = _reference(kept, dense)
    for column, cost in enumerate(objective.also, start=1):
        pair = values[:, [0, column]]
        own = [kept[i] for i in front(pair)]
        scores = np.array([result_of(r).score for r in own])
        errors = np.array([result_of(r).stderr for r in own])
        shares = np.array([result_of(r).shares[cost] for r in own])
        bend = knee(scores, errors, shares)
        if bend is not None:
            knees[cost] = own[bend.index].number, bend
        deals = [bargain(scores, errors, shares, reference, allowed) for allowed in LOSSES]
        bargains[cost] = tuple((own[deal.index].number, deal) for deal in deals if deal is not None)
    return Tradeoff(
        costs=objective.also,
        records=tuple(chosen),
        beyond=tuple(r.number for r in found if not objective.admits(result_of(r).shares)),
        volume=hypervolume(normalised(values), np.full(values.shape[1], 0.0)),
        knees=knees,
        bargains=bargains,
        against=against,
    )


def _reference(kept: Sequence[Record], dense: TrialResult | None) -> tuple[tuple[float, float], str]:
    if dense is not None:
        return (dense.score, dense.stderr), "dense"
    best = max(map(result_of, kept), key=lambda result: result.score)
    return (best.score, best.stderr), "best"


def distinct_cuts(records: Iterable[Record]) -> list[Record]:
    """Return one of each trials that differ in their recovery alone: the recipe among them, or the first one."""
    cuts: dict[str, Record] = {}
    for record in records:
        cut = str({**(record.config or {}), "recovery": None})
        if cut not in cuts or (record.recipe and not cuts[cut].recipe):
            cuts[cut] = record
    return list(cuts.values())


def finished_first(objective: ObjectiveConfig, records: Sequence[Record], top: int) -> list[Record]:
    """Return the `top` trials that are worth finishing of those that keep all hard limits, the first ones first.

    With one objective the first ones given. With several the knees, the ends of the front, and then those that add most
    to its hypervolume; when the front has too few, the first of the rest.

    Args:
        objective: of the study.
        records: scored in full, the best first.
        top: how many.
    """
    kept = [record for record in records if objective.admits(result_of(record).shares)]
    found = tradeoff(objective, kept, None)
    if found is None:
        return kept[:top]
    members = list(found.records)
    values = values_of(objective, members)
    index = {record.number: i for i, record in enumerate(members)}
    first = [index[number] for number, _ in found.knees.values() if number in index]
    first += [int(i) for i in np.argmax(values, axis=0)]
    chosen = [members[i] for i in spread(values, first, top)]
    rest = [record for record in kept if record.number not in index]
    return [*chosen, *rest][:top]


def lines(found: Tradeoff) -> Iterator[str]:
    """Yield the front as lines for a terminal."""
    yield f"front: {len(found.records)} trials, score against {', '.join(found.costs)} (fractions of the dense model)"
    for record in found.records:
        result = result_of(record)
        costs = ", ".join(f"{cost} {result.shares[cost]:.3f}" for cost in found.costs)
        name = f" ({record.recipe})" if record.recipe else ""
        roles = "".join(f"; {role}" for role in found.roles(record.number))
        yield f"  trial {record.number}{name}: {result.score:.4f} ± {result.stderr:.4f}, {costs}{roles}"
    for cost, (number, bend) in found.knees.items():
        if not bend.clear:
            yield f"  the knee in {cost}, trial {number}, lies within the noise of the scores"
    if found.beyond:
        yield f"  beyond a hard limit: trials {', '.join(map(str, found.beyond))}"
