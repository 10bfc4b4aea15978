"""What is believed of trials: against closed forms, and against the winner's curse."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.records import DENSE
from adasearch.search import surrogate
from adasearch.search.belief import FEW_TRIALS, Scored, evidence, expected_gain, expected_improvement, posterior
from tests.search.synthetic import make_space, make_study, search


class TestExpectedImprovement:
    @given(st.floats(-2, 2), st.floats(0.05, 2), st.floats(-2, 2))
    def test_is_the_integral(self, mean, sd, best):
        z = np.linspace(-9, 9, 20001)
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        brute = np.sum(np.maximum(mean + sd * z - best, 0.0) * density) * (z[1] - z[0])
        assert expected_improvement(mean, sd, best) == pytest.approx(brute, abs=1e-5)

    @given(st.floats(-2, 2), st.floats(-2, 2))
    def test_of_what_is_certain(self, mean, best):
        assert expected_improvement(mean, 0.0, best) == max(mean - best, 0.0)

    @given(st.floats(-2, 2), st.floats(0, 2), st.floats(0, 2), st.floats(-2, 2))
    def test_grows_with_the_uncertainty(self, mean, sd, more, best):
        assert expected_improvement(mean, sd + more, best) >= expected_improvement(mean, sd, best) - 1e-12


def problem(seed, n=36, noise=0.04):
    """Return points, true scores with a spread like the noise, and observed scores."""
    rng = np.random.default_rng(seed)
    points = rng.random((n, 3))
    truth = 0.12 * np.cos(2.5 * points[:, 0]) + 0.06 * points[:, 1]
    return points, truth, truth + noise * rng.standard_normal(n)


def test_the_posterior_mean_chooses_with_less_optimism_and_no_worse():
    """The luckiest of many noisy scores promises more than it holds; the posterior mean does not."""
    optimism, chosen = {"observed": [], "believed": []}, {"observed": [], "believed": []}
    for seed in range(10):
        points, truth, scores = problem(seed)
        data = surrogate.Observations(
            points=points, scores=scores, variances=np.full(len(scores), 0.04**2), pending=np.array([])
        )
        mean, sd = surrogate.posterior(data, points)
        assert (sd > 0).all()
        for name, figures in (("observed", scores), ("believed", mean)):
            best = int(np.argmax(figures))
            optimism[name].append(figures[best] - truth[best])
            chosen[name].append(truth[best] - truth.max())
    assert np.mean(optimism["observed"]) > 0.03
    assert abs(np.mean(optimism["believed"])) < 0.4 * np.mean(optimism["observed"])
    assert np.mean(chosen["believed"]) >= np.mean(chosen["observed"])


def test_the_posterior_is_in_units_of_the_score():
    points, _, scores = problem(0)
    variances = np.full(len(scores), 0.04**2)
    data = surrogate.Observations(points=points, scores=scores, variances=variances, pending=np.array([]))
    mean, sd = surrogate.posterior(data, points)
    moved = dataclasses.replace(data, scores=100 * scores + 7, variances=1e4 * variances)
    again, wider = surrogate.posterior(moved, points)
    assert again == pytest.approx(100 * mean + 7, rel=1e-3)
    assert wider == pytest.approx(100 * sd, rel=1e-2)
    assert np.corrcoef(mean, scores)[0, 1] > 0.5


def test_what_is_not_finite_is_a_fit_error():
    points, _, scores = problem(0)
    scores[3] = np.nan
    data = surrogate.Observations(points=points, scores=scores, variances=np.ones(len(scores)), pending=np.array([]))
    with pytest.raises(surrogate.FitError):
        surrogate.posterior(data, points)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Space and records of a search of twelve trials."""
    from adasearch import config
    from tests.search.synthetic import FAKES

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, registry in FAKES.items():
            monkeypatch.setitem(config.COMPONENTS, name, registry)
        study = make_study(trials=12)
        yield make_space(study), search(study, tmp_path_factory.mktemp("searched"))


class TestEvidence:
    def test_every_trial_has_its_score_and_a_posterior(self, searched):
        space, records = searched
        known, obstacle = evidence(space, records)
        assert obstacle == ""
        assert sorted(known) == list(range(12))
        for record in records:
            if record.number != DENSE:
                piece = known[record.number]
                assert (piece.score, piece.stderr) == (record.result.score, record.result.stderr)
                assert math.isfinite(piece.mean)
                assert piece.sd > 0
        means, scores = zip(*((p.mean, p.score) for p in known.values()), strict=True)
        assert np.std(means) < np.std(scores)  # shrunk towards each other
        assert np.corrcoef(means, scores)[0, 1] > 0.5

    def test_too_few_and_foreign_trials_and_failures_fall_back_to_the_score(self, searched, monkeypatch):
        space, records = searched
        known, obstacle = evidence(space, records[: FEW_TRIALS - 1])
        assert "too few" in obstacle
        assert all(piece.mean is None for piece in known.values())
        config = {**records[5].config, "allocation": {"type": "uniform"}}
        foreign = [*records[:5], dataclasses.replace(records[5], config=config), *records[6:]]
        known, obstacle = evidence(space, foreign)
        assert obstacle == "trial 4 is no point of the space"
        assert known[4].score == records[5].result.score

        def fail(*_):
            raise surrogate.FitError("no")

        monkeypatch.setattr(surrogate, "posterior", fail)
        known, obstacle = evidence(space, records)
        assert "the model failed" in obstacle
        assert len(known) == 12

    def test_a_score_taken_from_an_equal_trial_is_not_counted_twice(self, searched):
        space, records = searched
        alone, _ = evidence(space, records)
        best = max((r for r in records if r.number >= 0), key=lambda r: r.result.score)
        result = dataclasses.replace(best.result, notes={"same_trial_as": float(best.number)})
        twins = [dataclasses.replace(best, number=12 + i, result=result) for i in range(6)]
        known, _ = evidence(space, [*records, *twins])
        assert known[best.number].mean == pytest.approx(alone[best.number].mean)
        assert known[12].mean == pytest.approx(alone[best.number].mean)


class TestGain:
    def trials(self, searched, **changes):
        space, records = searched
        found = [r for r in records if r.number != DENSE]
        return [
            Scored(params=space.encode(r.config), score=r.result.score, stderr=changes.get("stderr", 0.01), full=True)
            for r in found
        ]

    def test_is_the_improvement_over_the_best_posterior_mean_in_its_errors(self, searched):
        space, _ = searched
        trials = self.trials(searched)
        params = {name: p.from_unit(0.7) for name, p in space.parameters.items()}
        mean, sd = posterior(space, trials, [*(t.params for t in trials), params])
        expected = expected_improvement(mean[-1], sd[-1], mean[:-1].max()) / 0.01
        assert expected_gain(space, trials, params) == pytest.approx(expected)
        assert expected > 0

    def test_a_trial_that_was_stopped_is_nothing_to_improve_on(self, searched):
        space, _ = searched
        trials = self.trials(searched)
        params = {name: p.from_unit(0.7) for name, p in space.parameters.items()}
        best = int(np.argmax(posterior(space, trials, [t.params for t in trials])[0]))
        lower = [dataclasses.replace(t, full=i != best) for i, t in enumerate(trials)]
        assert expected_gain(space, lower, params) > expected_gain(space, trials, params)

    def test_what_cannot_be_told_is_none(self, searched, monkeypatch):
        space, _ = searched
        trials = self.trials(searched)
        params = trials[0].params
        assert expected_gain(space, trials[: FEW_TRIALS - 1], params) is None
        assert expected_gain(space, [dataclasses.replace(t, full=False) for t in trials], params) is None
        assert expected_gain(space, self.trials(searched, stderr=0.0), params) is None

        def fail(*_):
            raise surrogate.FitError("no")

        monkeypatch.setattr(surrogate, "posterior", fail)
        assert expected_gain(space, trials, params) is None
