import dataclasses

import numpy as np
import pytest
import torch

from adasearch.search.surrogate import Candidates, FitError, Observations, fit, propose, thinned


def data_of(n=20, d=4, noise=0.02, pending=(), seed=0):
    rng = np.random.default_rng(seed)
    points = rng.random((n, d))
    scores = -((points - 0.3) ** 2).sum(1) + noise * rng.standard_normal(n)
    return Observations(points=points, scores=scores, variances=np.full(n, noise**2), pending=np.array(pending))


def candidates_of(q=200, d=4, seed=1):
    return np.random.default_rng(seed).random((q, d))


def run(data, candidates=None, free=True, snap=lambda index, row: row, seed=0, num=3):
    candidates = candidates_of(d=data.points.shape[1]) if candidates is None else candidates
    where = Candidates(points=candidates, free=np.full(candidates.shape, free), snap=snap)
    return propose(data, where, seed, num)


def test_the_same_seed_gives_the_same_points():
    one, two = run(data_of()), run(data_of())
    assert [p.index for p in one] == [p.index for p in two]
    assert all(np.array_equal(p.features, q.features) for p, q in zip(one, two, strict=True))


def test_the_best_point_lies_near_the_optimum_and_in_the_cube():
    best = run(data_of(n=30))[0].features
    assert ((best >= 0) & (best <= 1)).all()
    assert np.abs(best - 0.3).max() < 0.25


def test_fixed_columns_are_not_moved():
    candidates = candidates_of()
    free = np.zeros(candidates.shape, dtype=bool)
    free[:, 0] = True
    where = Candidates(points=candidates, free=free, snap=lambda index, row: row)
    for proposal in propose(data_of(), where, 0, 204):
        assert np.array_equal(proposal.features[1:], candidates[proposal.index][1:])


def test_moved_points_are_rounded_to_what_exists():
    found = run(data_of(), snap=lambda index, row: np.round(row * 4) / 4, num=204)
    moved = [p.features for p in found if not np.array_equal(p.features, candidates_of()[p.index])]
    assert moved
    assert all(np.array_equal(row, np.round(row * 4) / 4) for row in moved)


def test_running_points_are_avoided():
    data = data_of(n=30)
    first = run(data, free=False)[0]
    again = run(data_of(n=30, pending=[first.features]), free=False)[0]
    assert again.index != first.index


def test_a_noisy_trial_counts_less():
    data = data_of(n=12, noise=0.01)
    scores = data.scores.copy()
    scores[0] += 3.0
    variances = data.variances.copy()
    variances[0] = 9.0
    point = torch.as_tensor(data.points[:1])

    def mean(variances):
        made = Observations(points=data.points, scores=scores, variances=variances, pending=data.pending)
        return fit(made).posterior(point).mean.item()

    assert mean(variances) < mean(data.variances)


@pytest.mark.parametrize("scores", [np.zeros(8), np.full(8, 1e9), np.array([0.0] * 7 + [1e-12])])
def test_scores_without_spread_are_no_error(scores):
    data = Observations(points=candidates_of(8), scores=scores, variances=np.zeros(8), pending=np.array([]))
    assert len(run(data)) == 3


def test_what_is_not_finite_is_a_fit_error():
    data = Observations(
        points=candidates_of(4), scores=np.array([0, 1, np.nan, 2]), variances=np.zeros(4), pending=np.array([])
    )
    with pytest.raises(FitError):
        run(data)


def test_many_points_are_thinned_to_the_best_and_the_latest():
    scores = data_of(n=400).scores
    kept = thinned(scores, 300)
    assert len(set(kept.tolist())) == 300
    assert (np.diff(kept) > 0).all()
    assert set(np.argsort(-scores)[:100]) <= set(kept)
    assert set(range(300, 400)) <= set(kept)
    assert thinned(scores, 400).tolist() == list(range(400))


def test_columns_of_one_parameter_share_a_lengthscale():
    data = data_of(n=25)
    tied = dataclasses.replace(data, groups=np.array([0, 0, 1, 2]))
    lengths = fit(tied).covar_module.base_kernel.lengthscale.flatten()
    assert lengths[0] == lengths[1] != lengths[2]
    own = fit(data).covar_module.base_kernel.lengthscale.flatten()
    assert len(set(own.tolist())) == 4


def test_points_are_moved_no_farther_than_allowed():
    candidates = candidates_of()
    where = Candidates(points=candidates, free=np.full(candidates.shape, True), snap=lambda i, row: row, reach=0.05)
    for proposal in propose(data_of(), where, 0, 204):
        assert np.abs(proposal.features - candidates[proposal.index]).max() <= 0.05 + 1e-12


def test_the_callers_random_state_and_threads_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    run(data_of())
    assert torch.rand(1) == expected
    assert torch.get_num_threads() == threads
