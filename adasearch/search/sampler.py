"""Which trial comes next, as Optuna samplers. Every random draw follows from the study's seed and the trial number."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from adasearch.search.parameters import CategoricalParameter, Encoding, FloatParameter, IntParameter, Parameter
from adasearch.search.space import Space

_LOG = logging.getLogger(__name__)

NUM_RANDOM = 256
NUM_PARENTS = 8
NUM_CHILDREN = 32
TRIES = 64
STDERR, RECIPE = "stderr", "recipe"


def derived_seed(seed: int, number: int, purpose: str = "") -> int:
    """Return a seed below 2**32 for one purpose in one trial of a study."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def to_distribution(parameter: Parameter) -> BaseDistribution:
    """Return Optuna's name for a parameter."""
    if isinstance(parameter, CategoricalParameter):
        return CategoricalDistribution(parameter.choices)
    if isinstance(parameter, IntParameter):
        return IntDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def from_distribution(distribution: BaseDistribution) -> Parameter:
    """Return the parameter that an Optuna distribution describes."""
    if isinstance(distribution, CategoricalDistribution):
        return CategoricalParameter(choices=distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, log, step = distribution.low, distribution.high, distribution.log, distribution.step
    if isinstance(distribution, IntDistribution):
        return IntParameter(low=int(low), high=int(high), log=log, step=int(step or 1))
    return FloatParameter(low=low, high=high, log=log, step=step)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return what Optuna must be asked for: every parameter of the space, at every trial."""
    return {name: to_distribution(parameter) for name, parameter in space.parameters.items()}


@dataclass(frozen=True, slots=True)
class View:
    """How a sampler sees points: their encoding, which of their parameters count, and what makes two equal."""

    encoding: Encoding
    active: Callable[[dict[str, Any]], Collection[str]]
    key: Callable[[dict[str, Any]], str]


def _view(space: Space | None, search_space: dict[str, BaseDistribution]) -> View:
    if space is not None:
        return View(space.encoding, space.active, space.point_key)
    encoding = Encoding({name: from_distribution(d) for name, d in search_space.items()})
    names = tuple(sorted(search_space))
    return View(encoding, lambda _: names, lambda params: repr([params.get(name) for name in names]))


@dataclass(frozen=True, slots=True)
class Past:
    """What a sampler goes by: the trials with a value, those that run, the keys of all points known, and its turn.

    `turn` is the number of the trial to propose and the sign by which values grow better.
    """

    scored: list[FrozenTrial]
    pending: list[FrozenTrial]
    known: set[str]
    turn: tuple[int, float]


class SpaceSampler(BaseSampler):
    """A sampler of whole points: the first ones quasi-random, the others by what is known; `informed` says how.

    The first `startup` trials that are no recipes come from a quasi-random sequence. Points that are the same trial as
    an earlier one are avoided. There is no state but the study.

    Args:
        space: whose points are proposed; None takes whatever parameters all trials of the study have in common.
        seed: of all draws; None takes one at random.
        startup: number of quasi-random trials.
    """

    def __init__(self, space: Space | None = None, *, seed: int | None = None, startup: int = 6) -> None:
        self._space = space
        self._seed = secrets.randbits(32) if seed is None else seed
        self._startup = startup
        self._intersection = IntersectionSearchSpace()

    def reseed_rng(self) -> None:
        """Take another seed at random: Optuna calls it in each thread of ``Study.optimize(n_jobs=...)``."""
        self._seed = secrets.randbits(32)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the space's parameters, or those that all trials have in common."""
        del trial
        if self._space is not None:
            return distributions(self._space)
        common = self._intersection.calculate(study)
        return {name: distribution for name, distribution in common.items() if not distribution.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the values of all parameters for the next trial."""
        if len(study.directions) != 1:
            raise ValueError(f"the study must have one objective, given {len(study.directions)}")
        if not search_space:
            return {}
        view = _view(self._space, search_space)
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        known = {view.key(t.params) for t in others if search_space.keys() <= t.params.keys()}
        scored = [t for t in others if _is_scored(t, search_space)]
        before = sum(t.number < trial.number and RECIPE not in t.user_attrs for t in others)
        if before < self._startup or len(scored) < 2:
            return quasi_random(view, known, before, derived_seed(self._seed, 0, "sobol"))
        pending = [t for t in others if t.state == TrialState.RUNNING and search_space.keys() <= t.params.keys()]
        sign = -1.0 if study.direction == StudyDirection.MINIMIZE else 1.0
        return self.informed(study, trial, view, Past(scored, pending, known, (trial.number, sign)))

    @abstractmethod
    def informed(self, study: Study, trial: FrozenTrial, view: View, past: Past) -> dict[str, Any]:
        """Return the values of all parameters for `trial`, after the first ones; `past` has two scored trials."""

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return a random value of one parameter, the same for the same seed, trial and name."""
        del study
        unit = np.random.default_rng(derived_seed(self._seed, trial.number, param_name)).random()
        return from_distribution(param_distribution).from_unit(float(unit))


class BoTorchSampler(SpaceSampler):
    """Proposes by noisy expected improvement over a Gaussian process; see `adasearch.search.surrogate`.

    A trial's user attribute ``stderr`` is the standard error of its value. Running trials count as pending, failed
    ones not at all. When the model fails, TPE proposes instead.
    """

    def informed(self, study: Study, trial: FrozenTrial, view: View, past: Past) -> dict[str, Any]:
        """Return the point that looks best under the model, or what TPE proposes where the model fails."""
        try:
            return self._modelled(view, past.scored, past.pending, past.known, past.turn)
        except ArithmeticError as error:
            _LOG.warning("trial %d is proposed by TPE, the model having failed: %s", trial.number, error)
            return self._fallen_back(study, trial)

    def _modelled(
        self,
        view: View,
        scored: list[FrozenTrial],
        pending: list[FrozenTrial],
        known: set[str],
        turn: tuple[int, float],
    ) -> dict[str, Any]:
        from adasearch.search.surrogate import Observations, propose

        number, sign = turn

        def features(params: dict[str, Any]) -> np.ndarray:
            return view.encoding.features(params, view.active(params))

        def moved(index: int, row: np.ndarray) -> dict[str, Any]:
            return view.encoding.moved(candidates[index], view.active(candidates[index]), row)

        scores = np.array([sign * value_of(t) for t in scored])
        data = Observations(
            points=np.array([features(t.params) for t in scored]),
            scores=scores,
            variances=np.array([_variance(t) for t in scored]),
            pending=np.array([features(t.params) for t in pending]),
        )
        seed = derived_seed(self._seed, number, "candidates")
        parents = [scored[i].params for i in np.argsort(-scores, kind="stable")[:NUM_PARENTS]]
        candidates = _candidates(view, parents, known, seed)
        free = np.array([view.encoding.free(view.active(params)) for params in candidates])
        rows = np.array([features(params) for params in candidates])
        ranked = propose(data, rows, free, lambda i, row: features(moved(i, row)), seed, len(rows))
        for proposal in ranked:
            params = moved(proposal.index, proposal.features)
            if view.key(params) not in known:
                return params
        return moved(ranked[0].index, ranked[0].features)

    def _fallen_back(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        sampler = TPESampler(seed=derived_seed(self._seed, trial.number, "tpe"), n_startup_trials=1)
        return sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))


def quasi_random(view: View, known: set[str], index: int, seed: int) -> dict[str, Any]:
    """Return point `index` of a scrambled Sobol sequence, or the next one that is not `known` if there is one soon."""
    sequence = qmc.Sobol(len(view.encoding.parameters), scramble=True, seed=seed)
    if index:  # SciPy refuses to skip nothing
        sequence.fast_forward(index)
    first = params = view.encoding.from_units(sequence.random(1)[0])
    for _ in range(TRIES):
        if view.key(params) not in known:
            return params
        params = view.encoding.from_units(sequence.random(1)[0])
    return first


def _candidates(view: View, parents: list[dict[str, Any]], known: set[str], seed: int) -> list[dict[str, Any]]:
    """Return quasi-random points and neighbours of the best, without repetition, new ones if there are any."""
    rng = np.random.default_rng(seed)
    sequence = qmc.Sobol(len(view.encoding.parameters), scramble=True, seed=seed)
    points = [view.encoding.from_units(units) for units in sequence.random(NUM_RANDOM)]
    points += [view.encoding.mutated(parent, rng) for parent in parents for _ in range(NUM_CHILDREN)]
    distinct = {view.key(params): params for params in points}
    new = [params for key, params in distinct.items() if key not in known]
    return new or list(distinct.values())


def _is_scored(trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> bool:
    complete = trial.state == TrialState.COMPLETE and trial.values is not None
    return complete and math.isfinite(value_of(trial)) and search_space.keys() <= trial.params.keys()


def value_of(trial: FrozenTrial) -> float:
    """Return the value of a finished trial, the first of several."""
    return float(trial.values[0])


def _variance(trial: FrozenTrial) -> float:
    stderr = trial.user_attrs.get(STDERR, 0.0)
    known = isinstance(stderr, int | float) and math.isfinite(stderr)
    return float(stderr) ** 2 if known else 0.0
