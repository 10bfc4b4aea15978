"""Which sampler a study gets, and why: the settings, and Optuna's samplers as functions of what was told."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from adasearch.config import StudyConfig
from adasearch.documents import value
from adasearch.errors import ConfigError
from adasearch.search.evolution import EvolutionSampler, level_groups
from adasearch.search.parameters import CategoricalParameter
from adasearch.search.sampler import BoTorchSampler, derived_seed, distributions
from adasearch.search.space import Space
from adasearch.sections import SamplerConfig, SamplerType

if TYPE_CHECKING:
    from adasearch.search.prior import Prior

MODELLED = frozenset({"auto", "botorch"})
"""Samplers that take what earlier searches expect into their model."""
MODELLED_TRIALS = 500
"""Trials up to which a model's proposal takes at most about 3 s on two cores."""
MODELLED_COLUMNS = 160
"""Feature columns up to which it does; the trust region has made 60 to 120 its business."""
LEAST_POPULATION = 8
SEVERAL = ("auto", "botorch", "gp", "nsga2", "random", "tpe")
"""Samplers that know several objectives."""


@value
class Choice:
    """The sampler of a study and why it is this one, in a few words."""

    type: SamplerType
    reason: str

    @property
    def line(self) -> str:
        """Return what a user is told."""
        return f"sampler: {self.type} ({self.reason})"


def choose(study: StudyConfig, space: Space) -> Choice:
    """Return which sampler proposes the trials of a study: the one it names, or for ``auto`` the one that suits it.

    Raises:
        ConfigError: ``sampler.type``, where the named one knows a single objective only and the study has several.
    """
    named, several = study.sampler.type, bool(study.objective.also)
    if several and named not in SEVERAL:
        goal = f"the study minimises {', '.join(study.objective.also)} beside its score"
        raise ConfigError("sampler.type", f"must be one of {', '.join(SEVERAL)} where {goal}, given {named}")
    if named != "auto":
        return Choice(type=named, reason=f"named by the study{_caveat(named, space)}")
    columns, trials = space.encoding.num_columns, study.trials
    if trials > MODELLED_TRIALS:
        return Choice(type="tpe", reason=f"{trials} trials, more than the {MODELLED_TRIALS} a model is quick for")
    if columns > MODELLED_COLUMNS:
        many = f"{columns} features, more than the {MODELLED_COLUMNS} a model learns from"
        if level_groups(space.parameters) and not several:
            return Choice(type="evolution", reason=f"{many}, and levels to swap")
        return Choice(type="tpe", reason=many)
    noise = "a model of the score and its noise" + (" for each objective" if several else "")
    return Choice(type="botorch", reason=f"{trials} trials of {columns} features: {noise}")


def _caveat(named: str, space: Space) -> str:
    """Return what a user of the sampler should know of this space, the empty text where there is nothing."""
    names = [name for name, p in space.parameters.items() if isinstance(p, CategoricalParameter) and p.size > 1]
    if named == "cmaes" and names:
        return f"; draws the {len(names)} choices of the space at random, for its distribution is over numbers"
    if named == "evolution" and not level_groups(space.parameters):
        return "; the space has no levels to swap, so that it mutates one to three parameters of the best trial"
    return ""


def make_sampler(
    config: SamplerConfig, space: Space, seed: int, number: int, prior: Prior | None = None
) -> BaseSampler:
    """Return a new sampler for the trial `number`: it has no state but the study, so a resumed search goes on alike.

    Args:
        config: with the type that `choose` has decided on; ``auto`` counts as ``botorch``.
        space: of all trials.
        seed: of the study.
        number: of the trial that will be asked for.
        prior: what earlier searches of this space know; of all samplers only ours has a use for it.
    """
    if config.type in {"auto", "botorch"}:
        return BoTorchSampler(space, seed=seed, startup=config.startup, prior=prior)
    if config.type == "evolution":
        return EvolutionSampler(space, seed=seed, startup=config.startup)

    def made(number: int) -> BaseSampler:
        return _of_optuna(config, population(space), derived_seed(seed, number, config.type))

    if config.type in {"nsga2", "cmaes"}:
        return CopyingSampler(made, space, population(space))
    return CopyingSampler(made, space) if config.type == "gp" else made(number)


def population(space: Space) -> int:
    """Return how many trials a generation has: 4 + 3 ln P of P parameters, as CMA-ES has it, and 8 at least."""
    return max(LEAST_POPULATION, 4 + int(3 * math.log(max(1, len(space.parameters)))))


def _of_optuna(config: SamplerConfig, size: int, draw: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.type == "tpe":
            return TPESampler(seed=draw, n_startup_trials=config.startup)
        if config.type == "gp":
            return GPSampler(seed=draw, n_startup_trials=config.startup, deterministic_objective=False)
        if config.type == "nsga2":
            return NSGAIISampler(seed=draw, population_size=size)
        if config.type == "cmaes":
            return CmaEsSampler(seed=draw, popsize=size, warn_independent_sampling=False)
        assert config.type == "random", f"unknown sampler {config.type}"
        return RandomSampler(seed=draw)


class CopyingSampler(BaseSampler):
    """One of Optuna's samplers, asked on a study in memory of the trials that it can make sense of.

    Samplers with generations keep them in attributes of the trials that they propose. Our study holds points and scores
    only, and can be made again from them, so the trials told are played through the copy, generation by generation in
    the order of their numbers: the sampler is asked once for each, and what it notes goes to all of its trials. It gets
    the state that it would have if every trial had been told before the next was asked, whatever ran at the same time.
    It reads no running trials, and no failed ones. Its first generation is random, recipes are part of it.

    A trial that lacks a constraint which others have is left out: one such would end every later proposal of a GP.

    Args:
        made: number of a trial -> the sampler that proposes it.
        space: of all trials.
        generation: trials in a generation, 0 for a sampler without.
    """

    def __init__(self, made: Callable[[int], BaseSampler], space: Space, generation: int = 0) -> None:
        self._made = made
        self._distributions = distributions(space)
        self._generation = generation

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the space's parameters."""
        del study, trial
        return self._distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the values of all parameters for the next trial."""
        held = (TrialState.COMPLETE,) if self._generation else (TrialState.COMPLETE, TrialState.RUNNING)
        others = [t for t in study.get_trials(deepcopy=False, states=held) if t.number != trial.number]
        others = comparable([t for t in others if search_space.keys() <= t.params.keys()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            past = optuna.create_study(directions=study.directions, sampler=self._made(0))
            size = self._generation or len(others)
            for start in range(0, len(others), max(1, size)):
                part = others[start : start + size]
                past.add_trials(_noted(past, part) if self._generation else part)
            past.sampler = self._made(trial.number)
            return dict(past.ask(search_space).params)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value of a parameter that is none of the space."""
        return RandomSampler(seed=trial.number).sample_independent(study, trial, param_name, param_distribution)


def _noted(study: Study, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return trials with the attributes that the study's sampler gives to one that it proposes now."""
    asked = study.ask()
    assert asked.relative_params is not None  # it proposes when they are read
    state = study.tell(asked, state=TrialState.FAIL).system_attrs
    found = [copy.copy(trial) for trial in trials]
    for trial in found:
        trial.system_attrs = {**trial.system_attrs, **state}
    return found


def comparable(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that have every constraint which any of the finished ones has; running ones have none yet."""
    keys = {key for trial in trials for key in trial.constraints}
    return [t for t in trials if t.state == TrialState.RUNNING or keys <= t.constraints.keys()]
