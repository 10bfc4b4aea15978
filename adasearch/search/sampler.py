"""Which trial comes next, as Optuna samplers. Every random draw follows from the study's seed and the trial number."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from adasearch.search.noise import score_variances
from adasearch.search.parameters import CategoricalParameter, Encoding, FloatParameter, IntParameter, Parameter
from adasearch.search.space import MANY_PARAMETERS, Space

if TYPE_CHECKING:
    from adasearch.search.prior import Prior
    from adasearch.search.ranking import Candidates, Proposal

_LOG = logging.getLogger(__name__)

NUM_RANDOM = 256
NUM_PARENTS = 8
NUM_CHILDREN = 32
NUM_PERTURBED = 20
TRIES = 64
STDERR, NOISE, RECIPE = "stderr", "paired_stderr", "recipe"


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

    def features(self, points: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the features (N×d) of N points."""
        return np.array([self.encoding.features(params, self.active(params)) for params in points])

    def moved(self, params: dict[str, Any], row: np.ndarray) -> dict[str, Any]:
        """Return the point nearest to features (d) that differs from another in its free columns only."""
        return self.encoding.moved(params, self.active(params), row)

    def candidates(self, points: Sequence[dict[str, Any]], reach: float = 1.0) -> Candidates:
        """Return points as `ranking.ranked` takes them, which may be moved by at most `reach`."""
        from adasearch.search.ranking import Candidates

        free = np.array([self.encoding.free(self.active(params)) for params in points])

        def snap(index: int, row: np.ndarray) -> np.ndarray:
            return self.features([self.moved(points[index], row)])[0]  # type: ignore[no-any-return]

        return Candidates(points=self.features(points), free=free, snap=snap, reach=reach)

    def first_new(
        self, points: Sequence[dict[str, Any]], ranked: Sequence[Proposal], known: Collection[str]
    ) -> dict[str, Any]:
        """Return the best proposal that is none of the `known` points, the best of all where there is none."""
        for proposal in ranked:
            params = self.moved(points[proposal.index], proposal.features)
            if self.key(params) not in known:
                return params
        return self.moved(points[ranked[0].index], ranked[0].features)


def _view(space: Space | None, search_space: dict[str, BaseDistribution]) -> View:
    if space is not None:
        return View(space.encoding, space.active, space.point_key)
    encoding = Encoding({name: from_distribution(d) for name, d in search_space.items()})
    names = tuple(sorted(search_space))
    return View(encoding, lambda _: names, lambda params: repr([params.get(name) for name in names]))


@dataclass(frozen=True, slots=True)
class Past:
    """What a sampler goes by: the trials with a value, those that run, the keys of all points known, and its turn.

    `turn` is the number of the trial to propose and the sign by which values, the first ones, grow better.
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
        sign = -1.0 if study.directions[0] == StudyDirection.MINIMIZE else 1.0
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
    """Proposes by the upper confidence bound of a Gaussian process; see `adasearch.search.surrogate`.

    With several directions by noisy expected hypervolume improvement, see `adasearch.search.several`; the standard
    error of another value than the first is the user attribute ``stderr <metric name>``.

    A trial's user attribute ``paired_stderr`` is the standard error of its value against those of the others,
    ``stderr`` the plain one. Running trials count as pending, failed ones not at all. When the model fails, TPE
    proposes instead.

    Args:
        space: see `SpaceSampler`, as `seed` and `startup`.
        seed: of all draws.
        startup: number of quasi-random trials.
        prior: what earlier searches of this space know, None if there are none.
    """

    def __init__(
        self, space: Space | None = None, *, seed: int | None = None, startup: int = 6, prior: Prior | None = None
    ) -> None:
        super().__init__(space, seed=seed, startup=startup)
        self._prior = prior

    def informed(self, study: Study, trial: FrozenTrial, view: View, past: Past) -> dict[str, Any]:
        """Return the point that looks best under the model, or what TPE proposes where the model fails."""
        try:
            several = len(study.directions) > 1 or any(trial.constraints for trial in past.scored)
            return self._of_several(view, study, past) if several else self._modelled(view, past)
        except ArithmeticError as error:
            _LOG.warning("trial %d is proposed by TPE, the model having failed: %s", trial.number, error)
            return self._fallen_back(study, trial)

    def _modelled(self, view: View, past: Past) -> dict[str, Any]:
        from adasearch.search import surrogate

        scored, (number, sign) = past.scored, past.turn
        points = view.features([t.params for t in scored])
        scores, variances = np.array([sign * value_of(t) for t in scored]), _variances(scored)
        data = surrogate.Observations(
            points=points,
            scores=scores,
            variances=variances,
            pending=view.features([t.params for t in past.pending]),
            groups=view.encoding.groups,
            expected=self._prior.fit(points, scores, variances) if self._prior else None,
        )
        seed = derived_seed(self._seed, number, "candidates")
        model = surrogate.fit(data)
        # by the model's mean, because the best of noisy scores is the luckiest
        order = np.argsort(-surrogate.means(model, data.points), kind="stable")[:NUM_PARENTS]
        region = region_length(data.scores, len(view.encoding.parameters))
        candidates = _candidates(view, [scored[i].params for i in order], past.known, seed, region)
        where = view.candidates(candidates, region / 2)
        return view.first_new(candidates, surrogate.propose(data, where, seed, len(candidates), model), past.known)

    def _of_several(self, view: View, study: Study, past: Past) -> dict[str, Any]:
        """Return the next point of a study with several directions, or limits; a trial's values are told at once."""
        from adasearch.search import several

        scored, (number, _) = past.scored, past.turn
        signs = np.array([-1.0 if way == StudyDirection.MINIMIZE else 1.0 for way in study.directions])
        names = sorted({name for trial in scored for name in trial.constraints})
        data = several.Results(
            points=view.features([t.params for t in scored]),
            objectives=np.array([t.values for t in scored]) * signs,
            variances=np.column_stack([_variances(scored), _cost_variances(scored, study)]),
            # a trial of another study may lack a constraint: that it keeps it is not known
            constraints=np.array([[t.constraints.get(name, 1.0) for name in names] for t in scored]),
            pending=view.features([t.params for t in past.pending]),
            groups=view.encoding.groups,
        )
        seed = derived_seed(self._seed, number, "candidates")
        parents = [scored[i].params for i in several.parents(data, NUM_PARENTS)]
        candidates = _candidates(view, parents, past.known, seed, 2.0)
        where = view.candidates(candidates)
        return view.first_new(candidates, several.propose_several(data, where, seed, len(candidates)), past.known)

    def _fallen_back(self, study: Study, trial: FrozenTrial) -> dict[str, Any]:
        seed = derived_seed(self._seed, trial.number, "tpe")
        # multivariate, for with several objectives Optuna would else propose nothing and draw at random
        sampler = TPESampler(seed=seed, n_startup_trials=1, multivariate=True)
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


def region_length(scores: np.ndarray, num_parameters: int) -> float:
    """Return the side, in unit coordinates, of the region around the best point in which new points are looked for.

    Up to `MANY_PARAMETERS` it is everywhere, 2. Beyond that a model of few trials knows nothing far from them, and the
    region is that of TuRBO (Eriksson et al., NeurIPS 2019): doubled after 3 trials in a row that improve on the best,
    halved after so many that do not as there are parameters divided by 4, between 0.8 and 0.05; when it would get
    smaller it starts anew.

    Args:
        scores: of the trials so far, in their order, higher is better.
        num_parameters: of the space.
    """
    if num_parameters <= MANY_PARAMETERS:
        return 2.0
    length, successes, failures, patience = 0.8, 0, 0, max(5, num_parameters // 4)
    best = -math.inf
    for score in scores:
        better = score > best
        best = max(best, float(score))
        successes, failures = (successes + 1, 0) if better else (0, failures + 1)
        if successes == 3:
            length, successes = min(0.8, 2.0 * length), 0
        elif failures == patience:
            length, failures = length / 2.0, 0
            length = 0.8 if length < 0.05 else length
    return length


def _nearby(encoding: Encoding, params: dict[str, Any], length: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return a point of the region of side `length` around a point that differs in about 20 parameters.

    Many parameters changed at once by a little seldom do good (Regis & Shoemaker 2013).
    """
    result = dict(params)
    share = min(1.0, NUM_PERTURBED / len(encoding.parameters))
    for name, parameter in encoding.parameters.items():
        if rng.random() >= share:
            continue
        unit = float(rng.random())
        if not isinstance(parameter, CategoricalParameter):
            unit = parameter.to_unit(result[name]) + length * (unit - 0.5)
        result[name] = parameter.from_unit(unit)
    return result


def _candidates(
    view: View, parents: list[dict[str, Any]], known: set[str], seed: int, region: float
) -> list[dict[str, Any]]:
    """Return quasi-random points and neighbours of the best, without repetition, new ones if there are any."""
    rng = np.random.default_rng(seed)
    encoding = view.encoding
    sequence = qmc.Sobol(len(encoding.parameters), scramble=True, seed=seed)
    everywhere = region > 1.0
    points = [encoding.from_units(units) for units in sequence.random(NUM_RANDOM if everywhere else NUM_RANDOM // 8)]
    points += [encoding.mutated(parent, rng) for parent in parents for _ in range(NUM_CHILDREN)]
    if not everywhere:
        points += [_nearby(encoding, parents[0], region, rng) for _ in range(NUM_RANDOM)]
    distinct = {view.key(params): params for params in points}
    new = [params for key, params in distinct.items() if key not in known]
    return new or list(distinct.values())


def _is_scored(trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> bool:
    complete = trial.state == TrialState.COMPLETE and trial.values is not None
    return complete and all(map(math.isfinite, trial.values)) and search_space.keys() <= trial.params.keys()


def value_of(trial: FrozenTrial) -> float:
    """Return the value of a finished trial, the first of several."""
    return float(trial.values[0])


def _variances(scored: list[FrozenTrial]) -> np.ndarray:
    """Return the noise variances of scores, see `score_variances`."""
    paired, plain = (np.array([_positive(t.user_attrs.get(name)) for t in scored]) for name in (NOISE, STDERR))
    return score_variances(paired, plain)


def _positive(error: Any) -> float:
    """Return a standard error, nan where it is none."""
    known = isinstance(error, int | float) and math.isfinite(error) and error >= 0
    return float(error) if known else math.nan


def _cost_variances(scored: list[FrozenTrial], study: Study) -> np.ndarray:
    """Return the variances of all values but the first: of a cost where its standard error is known, else 0."""
    names = (study.metric_names or [""] * len(study.directions))[1:]
    errors = [[_positive(trial.user_attrs.get(f"{STDERR} {name}")) for name in names] for trial in scored]
    return np.asarray(np.square(np.nan_to_num(np.array(errors), nan=0.0)))
