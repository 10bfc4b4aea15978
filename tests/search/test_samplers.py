"""Every sampler: inside of the domain whatever the space and whatever was told; which one a study gets."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase

from adasearch.config import COMPONENTS, SpaceConfig
from adasearch.errors import ConfigError
from adasearch.search.evolution import EvolutionSampler, best_of, level_groups, swapped
from adasearch.search.parameters import IntParameter
from adasearch.search.sampler import distributions
from adasearch.search.samplers import SEVERAL, choose, comparable, make_sampler, population
from adasearch.sections import ObjectiveConfig, SamplerConfig
from tests.search.synthetic import BASE, DIMENSIONS, FAKES, make_space, make_study, objective

KINDS = ("botorch", "tpe", "gp", "nsga2", "random", "cmaes", "evolution")
LEVELS = {"allocation.layer_profile": {"layer_levels": {"layers": 4, "levels": 5}}}
SINGLE = {
    "importance": {"choice": ["taylor"]},
    "importance.taylor.power": {"float": [0.7, 0.7]},
    "calibration.samples": {"int": [8, 8], "log": True},
    "calibration.draw": {"int": [3, 3]},
}


@pytest.fixture(autouse=True, scope="module")
def _fakes():
    real = dict(COMPONENTS)
    COMPONENTS.update(FAKES)
    yield
    COMPONENTS.update(real)


def space_of(dimensions, **over):
    return make_space(make_study(space=SpaceConfig(name="test", dimensions=dimensions), **over))


def config_of(kind, startup=3):
    return SamplerConfig(type=kind, startup=startup)


def past_of(space, values, seed=0, **attributes):
    """Return a study of random points with these values; None is a failed trial."""
    study, rng = optuna.create_study(direction="maximize"), np.random.default_rng(seed)
    for value in values:
        params = space.encoding.from_units(rng.random(len(space.parameters)))
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(optuna.create_trial(
            state=state, value=value, params=params, distributions=distributions(space), user_attrs=attributes,
        ))  # fmt: skip
    return study


def asked(study, space, kind, seed=5):
    """Return the next point of a sampler, checked to be one of the space."""
    study.sampler = make_sampler(config_of(kind), space, seed, len(study.trials))
    params = study.ask(distributions(space)).params
    assert params.keys() == space.parameters.keys()
    for name, distribution in distributions(space).items():
        assert distribution._contains(distribution.to_internal_repr(params[name])), (name, params[name])
    space.decode(params)
    return params


def searched(space, kind, trials, seed=0, score=objective):
    """Return a study of the synthetic objective, the sampler made anew for each trial."""
    study, rng = optuna.create_study(direction="maximize"), np.random.default_rng(seed)
    for number in range(trials):
        study.sampler = make_sampler(config_of(kind), space, seed, number)
        trial = study.ask(distributions(space))
        study.tell(trial, score(space.decode(trial.params).to_dict()) + 0.01 * rng.standard_normal())
    return study


class TestEvolutionContract(BasicSamplerTestCase, RelativeSamplerTestCase):
    """Optuna's own tests of a sampler; evolution takes over after two of their ten trials."""

    @pytest.fixture
    def sampler(self):
        return partial(EvolutionSampler, seed=0, startup=2)


LINES = {
    "calibration.samples": st.tuples(st.integers(1, 40), st.integers(0, 60), st.booleans()).map(
        lambda x: {"int": [x[0], x[0] + x[1]], "log": x[2]}
    ),
    "calibration.draw": st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)).map(
        lambda x: {"int": [x[0], x[0] + x[1] * x[2]], "step": x[2]}
    ),
    "importance.taylor.power": st.tuples(st.floats(0.01, 2), st.sampled_from([1.0, 1.5, 30.0]), st.booleans()).map(
        lambda x: {"float": [x[0], x[0] * x[1]], "log": x[2]}
    ),
    "importance.taylor.grain": st.sampled_from([["element"], ["element", "vector"]]).map(lambda x: {"choice": x}),
    "allocation.layer_profile": st.sampled_from([LEVELS["allocation.layer_profile"], {"layer_profile": {"terms": 2}}]),
    "recovery": st.sampled_from([["none"], ["none", "lora"], ["lora", "none", {"type": "lora", "rank": 3}]]).map(
        lambda x: {"choice": x}
    ),
}
SPACES = st.fixed_dictionaries(
    {"importance": st.sampled_from([["taylor"], ["obs", "taylor"], ["taylor", "obs", "wanda_sp"]]).map(
        lambda x: {"choice": x}
    )},
    optional=LINES,
)  # fmt: skip
VALUES = st.lists(st.one_of(st.none(), st.just(0.5), st.floats(-2, 2)), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@given(lines=SPACES, values=VALUES, seed=st.integers(0, 999), running=st.integers(0, 1))
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_proposal_is_a_point_of_its_space(kind, lines, values, seed, running):
    space = space_of(lines)
    study = past_of(space, values, seed)
    for _ in range(running + 1):
        asked(study, space, kind, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_of_one_point_is_proposed(kind):
    space = space_of(SINGLE)
    assert space.num_points == 1
    study = searched(space, kind, 8)
    assert {space.point_key(t.params) for t in study.trials} == {space.point_key(study.trials[0].params)}
    assert study.trials[0].params["calibration.samples"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_domain_of_one_value_changes_no_proposal_of_the_others(kind):
    lines = {"recovery": {"choice": ["none", "lora"]}, "allocation.layer_profile": {"layer_profile": {"terms": 2}}}
    space = space_of({**lines, **SINGLE})
    study = searched(space, kind, 8)
    assert all(t.params["importance.taylor.power"] == 0.7 and t.params["calibration.draw"] == 3 for t in study.trials)
    assert len({space.point_key(t.params) for t in study.trials}) == 8


def test_a_number_of_one_value_is_no_feature():
    space = space_of({**SINGLE, "importance": {"choice": ["taylor", "obs"]}})
    taylor, obs = ({**space.encoding.from_units(np.zeros(4)), "importance": name} for name in ("taylor", "obs"))
    moved = np.flatnonzero(space.features(taylor) != space.features(obs))
    assert len(moved) == 1  # the choice itself
    assert not space.encoding.free(space.active(taylor)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_trials_failed_it_goes_on_proposing(kind):
    space = space_of(DIMENSIONS)
    study = past_of(space, [None] * 9)
    points = [asked(study, space, kind) for _ in range(3)]
    assert len({space.point_key(p) for p in points}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_trials_are_equal_it_goes_on_to_new_points(kind):
    space = space_of(DIMENSIONS)
    study = searched(space, kind, 9, score=lambda _: 0.5)
    assert len({space.point_key(t.params) for t in study.trials}) == 9
    equal = past_of(space, [0.25] * 9, stderr=0.0)
    assert space.point_key(asked(equal, space, kind)) not in {space.point_key(t.params) for t in equal.trials[:-1]}


@pytest.mark.parametrize("noise", [None, 0.0, math.nan, math.inf, -0.1, "unknown", 1e300])
@pytest.mark.parametrize("kind", ["botorch", "evolution"])
def test_noise_that_is_zero_missing_or_nonsense(kind, noise):
    space = space_of(DIMENSIONS)
    study = past_of(space, [0.1, 0.4, 0.2, 0.3], stderr=0.02)
    rest = past_of(space, [0.2, 0.5], seed=1, **({} if noise is None else {"stderr": noise}))
    study.add_trials(rest.trials)
    asked(study, space, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_value_without_bounds_is_tolerated(kind, value):
    space = space_of(DIMENSIONS)
    asked(past_of(space, [0.1, value, 0.3, 0.2, 0.4]), space, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_one_trial_without_constraints_ends_nothing(kind):
    space = space_of(DIMENSIONS)
    study = optuna.create_study(direction="maximize")
    for i, trial in enumerate(past_of(space, [0.1, 0.4, 0.2, 0.3, 0.5, 0.6]).trials):
        trial.system_attrs = {} if i == 2 else {"constraints": [0.1 - 0.1 * i]}
        study.add_trial(trial)
    asked(study, space, kind)


def test_trials_are_compared_that_have_all_constraints_or_run_still():
    space = space_of(DIMENSIONS)
    trials = past_of(space, [0.1, 0.4, None]).trials
    assert comparable(trials) == trials
    trials[1].set_constraint("size", 1.0)
    assert comparable(trials) == [trials[1]]
    trials[2].state = optuna.trial.TrialState.RUNNING
    assert comparable(trials) == trials[1:]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in SEVERAL and kind != "botorch"])
def test_several_objectives(kind):
    space = space_of(DIMENSIONS)
    study = optuna.create_study(directions=["maximize", "minimize"])
    for i in range(12):
        study.sampler = make_sampler(config_of(kind), space, 3, i)
        trial = study.ask(distributions(space))
        study.tell(trial, [objective(space.decode(trial.params).to_dict()), trial.params["calibration.samples"]])
    assert len({space.point_key(t.params) for t in study.trials}) == 12


class TestGenerations:
    """NSGA-II and CMA-ES keep their state in a study's attributes, of which ours has none."""

    @pytest.mark.parametrize("kind", ["nsga2", "cmaes"])
    def test_what_was_told_moves_the_next_generation(self, kind):
        space = space_of({"allocation.layer_profile": {"layer_profile": {"mlp": 2, "attention": 1}}})
        study = searched(space, kind, 40, seed=1)
        assert population(space) == 8
        first, last = ([t.value for t in part] for part in (study.trials[:16], study.trials[-16:]))
        assert np.mean(last) > np.mean(first) + 0.05

    @pytest.mark.parametrize("kind", ["nsga2", "cmaes"])
    def test_a_proposal_follows_from_points_and_values_alone(self, kind):
        space = space_of(DIMENSIONS)
        study = searched(space, kind, 20)
        bare = optuna.create_study(direction="maximize")
        for t in study.trials:
            bare.add_trial(optuna.create_trial(value=t.value, params=t.params, distributions=t.distributions))
        assert asked(bare, space, kind) == asked(study, space, kind)

    @pytest.mark.parametrize("kind", ["nsga2", "cmaes"])
    def test_running_trials_get_different_proposals(self, kind):
        space = space_of(DIMENSIONS)
        study = searched(space, kind, 20)
        assert len({space.point_key(asked(study, space, kind)) for _ in range(4)}) == 4


class TestEvolution:
    level = IntParameter(low=0, high=4)
    names = tuple(f"allocation.layer_profile.mlp.{i}" for i in range(4))

    def test_levels_below_one_path_belong_together(self):
        space = space_of({**DIMENSIONS, **LEVELS})
        attention = tuple(name.replace("mlp", "attention") for name in self.names)
        assert level_groups(space.parameters) == (self.names, attention)
        assert level_groups(space_of(DIMENSIONS).parameters) == ()

    @given(levels=st.lists(st.integers(0, 4), min_size=4, max_size=4), seed=st.integers(0, 999))
    def test_swaps_keep_the_sum_and_the_range(self, levels, seed):
        params = dict(zip(self.names, levels, strict=True))
        found = swapped(params, self.names, self.level, np.random.default_rng(seed))
        assert sum(found.values()) == sum(levels)
        assert all(0 <= level <= 4 for level in found.values())
        assert sum(abs(found[name] - params[name]) for name in self.names) <= 2 * 3

    def test_small_moves_are_the_commonest(self):
        rng, params = np.random.default_rng(0), dict.fromkeys(self.names, 2)
        moves = [swapped(params, self.names, self.level, rng) for _ in range(900)]
        sizes = [sum(abs(m[n] - 2) for n in self.names) // 2 for m in moves]
        assert sizes.count(1) > sizes.count(2) > sizes.count(3) > 0

    def test_levels_at_an_end_stay(self):
        params = dict.fromkeys(self.names, 4)
        assert swapped(params, self.names, self.level, np.random.default_rng(0)) == params

    def test_the_parent_is_the_best_mean_in_either_direction(self):
        space = space_of(LEVELS)
        study = past_of(space, [0.3, 0.9, 0.5, 0.1])
        lucky = study.trials[1]
        study.add_trial(optuna.create_trial(value=-0.7, params=lucky.params, distributions=lucky.distributions))
        from adasearch.search.sampler import View

        view = View(space.encoding, space.active, space.point_key)
        assert best_of(study.trials, view, 1.0) == study.trials[2].params  # 0.9 and -0.7 are 0.1 on the mean
        assert best_of(study.trials, view, -1.0) in [study.trials[1].params, study.trials[3].params]

    def test_offspring_keep_what_each_group_of_the_parent_pays(self):
        space = space_of({**LEVELS, "recovery": {"choice": ["none", "lora"]}})
        study = past_of(space, [0.1, 0.5, 0.3, 0.2])
        parent = study.trials[1].params
        groups = level_groups(space.parameters)
        others = []
        for _ in range(20):
            child = asked(study, space, "evolution")
            assert all(sum(child[n] for n in names) == sum(parent[n] for n in names) for names in groups)
            others.append(child["recovery"] != parent["recovery"])
        assert len({space.point_key(t.params) for t in study.trials}) == 24
        assert 0 < sum(others) < 12

    def test_it_climbs_over_levels(self):
        space = space_of({"allocation.layer_profile": {"layer_levels": {"layers": 6, "levels": 7, "attention": False}}})

        def score(config):
            target = [1 / 6, 1 / 6, 1 / 2, 1 / 2, 5 / 6, 5 / 6]
            return -sum((a - b) ** 2 for a, b in zip(config["allocation"]["mlp"], target, strict=True))

        best = {kind: [searched(space, kind, 60, seed, score).best_value for seed in range(3)]
                for kind in ("evolution", "random")}  # fmt: skip
        assert np.mean(best["evolution"]) > np.mean(best["random"]) + 0.05


class TestChoice:
    @pytest.mark.parametrize(("lines", "trials", "kind", "why"), [
        (DIMENSIONS, 60, "botorch", "60 trials of 15 features"),
        (DIMENSIONS, 501, "tpe", "501 trials"),
        ({"allocation.layer_profile": {"layer_levels": {"layers": 60}}}, 60, "botorch", "120 features"),
        ({"allocation.layer_profile": {"layer_levels": {"layers": 90}}}, 60, "evolution", "levels to swap"),
        ({"allocation.layer_profile": {"layer_profile": {"mlp": 200}}}, 60, "tpe", "200 features"),
        (SINGLE, 60, "botorch", "60 trials"),
    ])  # fmt: skip
    def test_auto_says_what_and_why(self, lines, trials, kind, why):
        study = make_study(space=SpaceConfig(name="s", dimensions=lines), trials=trials, sampler=SamplerConfig())
        found = choose(study, make_space(study))
        assert found.type == kind
        assert why in found.line

    def test_a_named_one_is_taken_with_what_should_be_known_of_it(self):
        def reason(kind, **over):
            study = make_study(sampler=SamplerConfig(type=kind), **over)
            return choose(study, make_space(study)).reason

        assert reason("tpe") == "named by the study"
        assert "draws the 4 choices of the space at random" in reason("cmaes")
        assert "no levels to swap" in reason("evolution")
        assert reason("evolution", space=SpaceConfig(name="s", dimensions=LEVELS)) == "named by the study"

    @pytest.mark.parametrize("kind", ["auto", *KINDS])
    def test_what_knows_one_objective_only_is_refused_for_several(self, kind):
        several = dataclasses.replace(ObjectiveConfig(search=("cloze/pydoc",)), also=("latency",))
        study = make_study(sampler=SamplerConfig(type=kind), objective=several)
        if kind not in {"cmaes", "evolution"}:
            assert choose(study, make_space(study)).type in SEVERAL
            return
        with pytest.raises(ConfigError, match=f"beside its score, given {kind}") as caught:
            choose(study, make_space(study))
        assert caught.value.where == "sampler.type"

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_sampler_of_each_kind_is_made(self, kind):
        assert isinstance(make_sampler(config_of(kind), space_of(DIMENSIONS), 1, 2), BaseSampler)


def test_base_is_the_profile_that_levels_are_laid_on():
    assert BASE["allocation"] == "layer_profile"
    space = space_of(LEVELS)
    item = space.decode(space.encoding.from_units(np.full(8, 0.99))).to_dict()["allocation"]
    assert item == {"type": "layer_profile", "mlp": [1.0] * 4, "attention": [1.0] * 4}
