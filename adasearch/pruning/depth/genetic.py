"""Genetic: a population of sets of layers to remove, of constant size, evolves towards the lowest loss."""

from __future__ import annotations

import random
from typing import Annotated, Literal

import pydantic

from adasearch.documents import Count, Share, value
from adasearch.pruning.depth import DepthContext, Item, LossOptions, paths_of
from adasearch.registry import DEPTH


@value
class GeneticOptions(LossOptions):
    """Settings.

    Args:
        unit: what goes at once.
        population: number of sets in one generation.
        generations: how often a new one is bred.
        mutation: probability that a child swaps one item that goes for one that stays.
        tournament: number of sets drawn at random of which the best becomes a parent.
    """

    unit: Literal["layer", "sublayer"] = "layer"
    population: Annotated[int, pydantic.Field(ge=2)] = 20
    generations: Count = 10
    mutation: Share = 0.3
    tournament: Count = 3


class _Breeding:
    """Sets of items, each as many as fit, as flags over the items, and what is made of them at random.

    A set comes from an order of all items: those go that still fit beside the ones before. Where items cost the same
    all sets are of one size; where they do not, none exceeds the room.
    """

    def __init__(self, context: DepthContext, options: GeneticOptions) -> None:
        self._context, self._options = context, options
        self.items = context.items(options.unit)
        self._random = random.Random(context.seed)
        self._losses: dict[frozenset[Item], float] = {}

    def _set(self, *classes: list[Item]) -> frozenset[Item]:
        """Return the set of an order in which classes follow each other, each shuffled."""
        order = [item for part in classes for item in self._random.sample(part, len(part))]
        return frozenset(self._context.fitting(order))

    def stranger(self) -> frozenset[Item]:
        """Return a set at random."""
        return self._set(list(self.items))

    def parent(self, generation: list[frozenset[Item]]) -> frozenset[Item]:
        """Return the best of a few sets drawn with replacement."""
        drawn = self._random.choices(generation, k=self._options.tournament)
        return min(drawn, key=lambda chosen: self._losses[chosen])

    def child(self, one: frozenset[Item], other: frozenset[Item]) -> frozenset[Item]:
        """Return what two parents agree on, filled up with what one of them has; sometimes with one swap."""
        # Lists in the order of the model: that of a set of strings differs between processes.
        both = [item for item in self.items if item in one and item in other]
        either = [item for item in self.items if (item in one) != (item in other)]
        neither = [item for item in self.items if item not in one and item not in other]
        made = self._set(both, either, neither)
        if self._random.random() < self._options.mutation:
            stays = [item for item in self.items if item not in made]
            goes = [item for item in self.items if item in made]
            if goes and stays:
                new, old = [self._random.choice(stays)], [self._random.choice(goes)]
                rest = [item for item in goes if item not in old]
                made = self._set(new, rest, [item for item in stays if item not in new], old)
        return made

    def measured(self, generation: list[frozenset[Item]]) -> list[frozenset[Item]]:
        """Return the different sets of a generation, best first; each is measured once in a lifetime.

        Sets that agree in their lowest layers are measured one after the other. Of equal losses the first counts.
        """

        def key(chosen: frozenset[Item]) -> tuple[int, ...]:
            return tuple(i for i, item in enumerate(self.items) if item in chosen)

        different = sorted(set(generation), key=key)
        for chosen in different:
            if chosen not in self._losses:
                self._losses[chosen] = self._context.loss(frozenset(paths_of(chosen)))
        return sorted(different, key=lambda chosen: self._losses[chosen])


@DEPTH.register(options=GeneticOptions, needs=lambda _: frozenset(), uses_loss=True)
def choose(context: DepthContext, options: GeneticOptions) -> tuple[str, ...]:
    """Return the best set that was seen, in the order of the model.

    The chromosome says of each layer whether it goes, the number of those that go is fixed, the fitness is the loss
    (EvoP, arXiv 2502.14910). Parents are the best of a few; a child keeps what both have; the best sets of parents and
    children, as many as the population, go on.
    """
    breeding = _Breeding(context, options)
    alive = breeding.measured([breeding.stranger() for _ in range(options.population)])
    for _ in range(options.generations):
        pairs = [(breeding.parent(alive), breeding.parent(alive)) for _ in range(options.population)]
        children = [breeding.child(one, other) for one, other in pairs]
        alive = breeding.measured([*alive, *children])[: options.population]
    return paths_of(item for item in breeding.items if item in alive[0])
