from __future__ import annotations

from functools import partial

import numpy as np
import optuna
import pytest
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase

from adasearch.search import surrogate
from adasearch.search.parameters import CategoricalParameter, FloatParameter, IntParameter
from adasearch.search.sampler import (
    BoTorchSampler,
    distributions,
    from_distribution,
    region_length,
    to_distribution,
)
from adasearch.search.samplers import make_sampler
from adasearch.sections import SamplerConfig
from tests.search.synthetic import make_space, make_study, objective


class TestOptunaContract(BasicSamplerTestCase, RelativeSamplerTestCase):
    """Optuna's own tests of a sampler; the model takes over after eight of their ten trials."""

    @pytest.fixture
    def sampler(self):
        return partial(BoTorchSampler, seed=0, startup=8)


@pytest.fixture
def space(fakes):
    return make_space(make_study())


def study_of(space, sampler, trials, seed=0):
    """Return a study of the synthetic objective in memory, its sampler made anew for each trial."""
    study = optuna.create_study(direction="maximize", sampler=sampler(0))
    rng = np.random.default_rng(seed)
    for number in range(trials):
        study.sampler = sampler(number)
        trial = study.ask(distributions(space))
        trial.set_user_attr("stderr", 0.01)
        score = objective(space.decode(trial.params).to_dict()) + 0.01 * rng.standard_normal()
        study.tell(trial, score)
    return study


@pytest.mark.parametrize("parameter", [
    FloatParameter(low=0.0, high=1.0, step=0.25), FloatParameter(low=1e-5, high=1.0, log=True),
    IntParameter(low=1, high=9, step=2), IntParameter(low=2, high=64, log=True),
    CategoricalParameter(choices=("a", None, 2)),
])  # fmt: skip
def test_parameters_and_distributions_say_the_same(parameter):
    assert from_distribution(to_distribution(parameter)) == parameter


@pytest.mark.parametrize("kind", ["botorch", "tpe", "gp", "random"])
def test_a_new_sampler_for_each_trial_proposes_the_same_from_the_same_study(space, kind):
    config = SamplerConfig(type=kind, startup=3)
    runs = [study_of(space, partial(make_sampler, config, space, 5), 5) for _ in range(2)]
    points = [[t.params for t in study.trials] for study in runs]
    assert points[0] == points[1]
    other = study_of(space, partial(make_sampler, config, space, 6), 5)
    assert [t.params for t in other.trials] != points[0]
    assert len({space.point_key(params) for params in points[0]}) == 5


def test_failed_pruned_and_incomplete_trials_are_tolerated(space):
    study = study_of(space, lambda number: BoTorchSampler(space, seed=1, startup=2), 4)
    study.tell(study.ask(distributions(space)), state=optuna.trial.TrialState.FAIL)
    study.tell(study.ask(distributions(space)), state=optuna.trial.TrialState.PRUNED)
    study.add_trial(optuna.create_trial(value=0.1))
    study.add_trial(
        optuna.create_trial(value=float("inf"), params=study.trials[0].params, distributions=distributions(space))
    )
    study.ask(distributions(space))
    params = study.ask(distributions(space)).params
    space.decode(params)
    assert params not in [t.params for t in study.trials[:-1]]


def test_where_the_model_fails_tpe_proposes_and_it_is_logged(space, monkeypatch, caplog):
    def failing(*_):
        raise surrogate.FitError("not positive definite")

    monkeypatch.setattr(surrogate, "propose", failing)
    study = study_of(space, lambda number: BoTorchSampler(space, seed=1, startup=2), 4)
    assert len(study.trials) == 4
    assert caplog.text.count("is proposed by TPE") == 2
    assert "not positive definite" in caplog.text


def test_known_trials_are_not_proposed_again_while_there_are_others(fakes):
    from adasearch.config import SpaceConfig

    small = SpaceConfig(
        name="small",
        dimensions={"importance": {"choice": ["taylor", "obs", "wanda_sp"]}, "recovery": {"choice": ["none", "lora"]}},
    )
    space = make_space(make_study(space=small))
    study = study_of(space, lambda number: BoTorchSampler(space, seed=1, startup=3), 7)
    keys = [space.point_key(t.params) for t in study.trials]
    assert len(set(keys[:6])) == 6
    assert keys[6] in keys[:6]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_either_direction_is_followed(direction):
    sign = 1 if direction == "maximize" else -1
    study = optuna.create_study(direction=direction, sampler=BoTorchSampler(seed=0, startup=4))
    study.optimize(lambda t: sign * -((t.suggest_float("x", 0, 1) - 0.3) ** 2), n_trials=9)
    assert abs(study.best_params["x"] - 0.3) < 0.05


def test_it_beats_random_search_on_the_synthetic_objective(space):
    def best(kind, seed):
        sampler = partial(make_sampler, SamplerConfig(type=kind, startup=6), space, seed)
        study = study_of(space, sampler, 25, seed)
        return objective(space.decode(study.best_params).to_dict())

    seeds = range(3)
    modelled, random = ([best(kind, seed) for seed in seeds] for kind in ("botorch", "random"))
    assert np.mean(modelled) > np.mean(random) + 0.01


class TestRegion:
    """Where a search of many parameters looks for the next point."""

    def test_few_parameters_are_searched_everywhere(self):
        assert region_length(np.zeros(50), 24) == 2.0

    def test_failures_shrink_it_and_successes_widen_it_again(self):
        assert region_length(np.arange(30.0), 60) == 0.8
        failing = np.concatenate([[1.0], np.zeros(15)])
        assert region_length(failing, 60) == 0.4
        assert region_length(np.concatenate([failing, [2.0, 3.0]]), 60) == 0.4
        assert region_length(np.concatenate([failing, [2.0, 3.0, 4.0]]), 60) == 0.8

    def test_it_starts_anew_when_it_is_too_small(self):
        lengths = [region_length(np.concatenate([[1.0], np.zeros(15 * k)]), 60) for k in range(6)]
        assert lengths == [0.8, 0.4, 0.2, 0.1, 0.05, 0.8]


def test_what_moves_scores_against_each_other_counts_as_noise(space):
    """A plain error is mostly common to all trials; a paired one is not."""
    from adasearch.search import sampler

    study = study_of(space, lambda number: BoTorchSampler(space, seed=1, startup=4), 4)
    trials = study.get_trials()
    assert sampler._variances(trials).tolist() == [0.0] * 4
    for trial, error in zip(trials, (0.01, 0.02, 0.03), strict=False):
        trial.user_attrs["paired_stderr"] = error
    assert sampler._variances(trials).tolist() == pytest.approx([1e-4, 4e-4, 9e-4, 4e-4])
