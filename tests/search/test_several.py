"""Proposals for several objectives: on problems whose front is known."""

import numpy as np
import optuna
import pytest
import torch

from adasearch.pareto import hypervolume
from adasearch.search import several
from adasearch.search.sampler import BoTorchSampler
from adasearch.search.several import Results, parents, propose_several
from adasearch.search.surrogate import Candidates, FitError

REFERENCE = np.array([-0.2, -1.05])


def objectives_of(points):
    """Score and negative cost: the first column is the cost, the score rises with its root; the others cost score."""
    score = np.sqrt(points[:, 0]) - ((points[:, 1:] - 0.4) ** 2).sum(1)
    return np.column_stack([score, -points[:, 0]])


def data_of(n=12, d=3, seed=0, noise=0.02, pending=(), bound=None, points=None):
    rng = np.random.default_rng(seed)
    points = rng.random((n, d)) if points is None else points
    values = objectives_of(points)
    values[:, 0] += noise * rng.standard_normal(len(points))
    limits = np.zeros((len(points), 0)) if bound is None else (points[:, :1] - bound)
    return Results(
        points=points,
        objectives=values,
        variances=np.tile([noise**2, 0.0], (len(points), 1)),
        constraints=limits,
        pending=np.array(pending),
    )


def candidates_of(q=60, d=3, seed=1):
    return np.random.default_rng(seed).random((q, d))


def run(data, candidates=None, free=True, snap=lambda index, row: row, seed=0, num=3):
    candidates = candidates_of(d=data.points.shape[1]) if candidates is None else candidates
    where = Candidates(points=candidates, free=np.full(candidates.shape, free), snap=snap)
    return propose_several(data, where, seed, num)


def test_the_same_seed_gives_the_same_points_and_leaves_the_callers_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = run(data_of()), run(data_of())
    assert torch.rand(1) == expected
    assert [p.index for p in one] == [p.index for p in two]
    assert all(np.array_equal(p.features, q.features) for p, q in zip(one, two, strict=True))


def test_proposals_gain_more_volume_than_as_many_random_points():
    data = data_of(12, noise=0.0)
    points = data.points
    for turn in range(6):
        best = run(data_of(points=points, noise=0.0), candidates_of(seed=turn), seed=turn, num=1)[0]
        points = np.vstack([points, best.features])
    found = hypervolume(objectives_of(points), REFERENCE)
    random = [
        hypervolume(objectives_of(np.vstack([data.points, candidates_of(6, seed=seed)])), REFERENCE)
        for seed in range(100, 120)
    ]
    assert found > max(random)


def test_a_point_beyond_a_limit_is_not_proposed():
    data = data_of(20, bound=0.5)
    free = run(data_of(20), num=1)[0]
    kept = [p.features[0] for p in run(data, num=10)]
    assert max(kept) < 0.6
    assert np.mean(kept) < 0.5
    assert free.features.shape == (3,)


def test_while_nothing_is_feasible_the_search_goes_towards_the_limit():
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(0.4, 1, 16), rng.random((16, 2))])
    data = data_of(points=points, bound=0.3)
    assert not data.feasible.any()
    assert np.mean([p.features[0] for p in run(data, num=5)]) < 0.3
    assert parents(data, 3) == np.argsort(points[:, 0])[:3].tolist()


def test_running_points_are_avoided():
    first = run(data_of(), free=False)[0]
    again = run(data_of(pending=[first.features]), free=False)[0]
    assert again.index != first.index


def test_fixed_columns_stay_and_moved_points_are_rounded_to_what_exists():
    candidates = candidates_of()
    free = np.zeros(candidates.shape, dtype=bool)
    free[:, 0] = True
    snap = lambda i, row: np.array([round(row[0], 1), *row[1:]])  # noqa: E731
    found = propose_several(data_of(), Candidates(points=candidates, free=free, snap=snap), 0, 999)
    moved = [p for p in found if not np.array_equal(p.features, candidates[p.index])]
    assert moved
    for p in moved:
        assert np.array_equal(p.features[1:], candidates[p.index][1:])
        assert p.features[0] == round(p.features[0], 1)


@pytest.mark.parametrize("kind", ["one_best", "constant_cost", "equal", "three"])
def test_fronts_without_extent_are_no_error(kind):
    data = data_of(8)
    values = data.objectives.copy()
    if kind == "one_best":
        values[0] = 5.0
    elif kind == "constant_cost":
        values[:, 1] = -0.8
    elif kind == "equal":
        values[:] = 0.0
    else:
        values = np.column_stack([values, values[:, 1] + 0.1 * data.points[:, 1]])
    made = Results(
        points=data.points, objectives=values, variances=np.zeros_like(values), constraints=data.constraints,
        pending=data.pending,
    )  # fmt: skip
    assert len(run(made, candidates_of(40))) == 3


def test_what_is_not_finite_is_a_fit_error():
    data = data_of(6)
    data.objectives[2, 0] = np.nan
    with pytest.raises(FitError):
        run(data)


def test_many_points_are_thinned_to_the_front_and_the_latest():
    data = data_of(400)
    kept = several._thinned(data)
    assert len(kept.points) == several.MAX_POINTS
    rows = {tuple(row) for row in kept.objectives}
    assert all(tuple(data.objectives[i]) in rows for i in data.front)
    assert tuple(data.objectives[-1]) in rows


def test_a_study_of_several_directions_is_sampled_and_limits_are_kept():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=BoTorchSampler(seed=1, startup=5))
    study.set_metric_names(["score", "cost"])
    for _ in range(12):
        trial = study.ask()
        x = np.array([[trial.suggest_float(name, 0, 1) for name in "abc"]])
        score, cost = objectives_of(x)[0]
        trial.set_user_attr("stderr", 0.01)
        trial.set_constraint("cost", x[0, 0] - 0.7)
        study.tell(trial, [score, -cost])
    assert all(t.params["a"] < 0.75 for t in study.trials[5:])
    random = objectives_of(np.array([list(t.params.values()) for t in study.trials[:5]]))
    later = objectives_of(np.array([list(t.params.values()) for t in study.trials]))
    assert hypervolume(later, REFERENCE) > hypervolume(random, REFERENCE)


def test_one_objective_under_a_limit_is_improved_within_it():
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=BoTorchSampler(seed=1, startup=5))
    for _ in range(11):
        trial = study.ask()
        x = np.array([trial.suggest_float(name, 0, 1) for name in "ab"])
        trial.set_constraint("cost", x[0] - 0.5)
        trial.set_user_attr("stderr", 0.001)
        study.tell(trial, float(-((x - 0.8) ** 2).sum()))
    later = study.trials[5:]
    assert np.mean([t.params["a"] <= 0.55 for t in later]) > 0.6
    best = max((t for t in study.trials if t.params["a"] <= 0.5), key=lambda t: t.value)
    assert best.value > -0.13  # -0.09 is the best within the limit, 0 beyond it
