"""Fronts, volumes and knees against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from adasearch.pareto import bargain, front, hypervolume, knee, normalised, spread

GRID = st.integers(0, 4).map(float)


def points(m, most=9):
    return st.integers(1, most).flatmap(lambda n: arrays.arrays(float, (n, m), elements=GRID))


def dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("m", [1, 2, 3])
@given(data=st.data())
def test_the_front_is_what_no_other_point_dominates(m, data):
    values = data.draw(points(m))
    feasible = data.draw(arrays.arrays(bool, len(values)))
    rows = [tuple(row) for row in values]
    allowed = [i for i in range(len(rows)) if feasible[i]]
    best = [i for i in allowed if not any(dominates(rows[j], rows[i]) for j in allowed)]
    first = [i for i in best if rows.index(rows[i]) == i or rows[i] not in [rows[j] for j in best if j < i]]
    assert front(values, feasible).tolist() == first


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@given(data=st.data())
def test_the_volume_is_the_number_of_cells_that_points_dominate(m, data):
    values, reference = data.draw(points(m)), np.full(m, 0.0)
    corners = np.stack(np.meshgrid(*[np.arange(4)] * m, indexing="ij"), -1).reshape(-1, m) + 1.0
    cells = (values[None] >= corners[:, None]).all(-1).any(1).sum()
    assert hypervolume(values, reference) == pytest.approx(float(cells))


@pytest.mark.parametrize("m", [2, 3])
def test_the_volume_agrees_with_darts(m):
    rng = np.random.default_rng(m)
    values, reference = rng.random((30, m)), np.full(m, 0.2)
    darts = reference + rng.random((200_000, m)) * (1 - reference)
    hit = np.zeros(len(darts), dtype=bool)
    for row in values:
        hit |= (row >= darts).all(1)
    assert hypervolume(values, reference) == pytest.approx(hit.mean() * 0.8**m, abs=4e-3)


def test_a_front_is_covered_by_first_ends_then_what_adds_most():
    cost = np.linspace(0, 1, 21)
    values = np.column_stack([np.sqrt(cost), -cost])
    chosen = spread(values, [0, 20], 5)
    assert chosen[:2] == [0, 20]
    rest = [i for i in range(21) if i not in chosen[:2]]
    scaled = normalised(values)
    volumes = {i: hypervolume(scaled[[0, 20, i]], np.full(2, -0.1)) for i in rest}
    assert chosen[2] == max(volumes, key=volumes.get)
    assert len(set(chosen)) == 5
    assert spread(values, [3, 3], 1) == [3]
    assert len(spread(values, [], 99)) == 21


def test_the_knee_is_farthest_from_the_line_between_the_ends():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.uniform(0.5, 0.9, 12))
    scores = 0.6 - 0.1 / (costs - 0.4)
    scores /= 10
    a, b = np.array([0.0, 0.0]), np.array([1.0, 1.0])
    scaled = np.column_stack([(costs - costs[0]) / np.ptp(costs), (scores - scores[0]) / np.ptp(scores)])
    line, away = b - a, scaled - a
    distance = np.abs(line[0] * away[:, 1] - line[1] * away[:, 0]) / np.linalg.norm(line)
    order = rng.permutation(12)
    found = knee(scores[order], np.full(12, 1e-6), costs[order])
    assert order[found.index] == int(np.argmax(distance))
    assert found.gain == pytest.approx(distance.max() * np.sqrt(2) * np.ptp(scores))
    assert found.clear


def test_a_bend_within_noise_is_not_clear():
    scores, costs = np.array([0.2, 0.35, 0.4]), np.array([0.5, 0.6, 0.8])
    sharp = knee(scores, np.full(3, 0.01), costs)
    assert (sharp.index, sharp.clear) == (1, True)
    assert sharp.stderr == pytest.approx(0.01 * np.sqrt(1 + 4 / 9 + 1 / 9))
    assert not knee(scores, np.full(3, 0.06), costs).clear


@pytest.mark.parametrize(
    ("scores", "costs"),
    [([0.2, 0.4], [0.5, 0.8]), ([0.2, 0.25, 0.4], [0.5, 0.7, 0.8]), ([0.4], [1.0]), ([0.3, 0.3, 0.3], [0.5, 0.5, 0.5])],
)
def test_no_bend_no_knee(scores, costs):
    assert knee(np.array(scores), np.full(len(scores), 0.01), np.array(costs)) is None


def test_a_bargain_is_the_cheapest_that_loses_no_more_than_allowed():
    scores, errors, costs = np.array([0.39, 0.37, 0.2, 0.385]), np.full(4, 0.001), np.array([0.9, 0.8, 0.5, 0.8])
    found = bargain(scores, errors, costs, (0.4, 0.001), 0.05)
    assert (found.index, found.loss) == (3, pytest.approx(0.015))
    assert found.sure
    close = bargain(scores, errors, costs, (0.4, 0.001), 0.0151)
    assert (close.index, close.sure) == (3, False)
    assert bargain(scores, errors, costs, (0.4, 0.001), 0.001) is None
