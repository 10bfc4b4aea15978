"""Reductions and normalisations against their definitions, and what they must not depend on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.pruning import reduction

NORMALISATIONS = ["none", "zscore", "l2", "minmax", "mean", "rank"]
SCORES = st.lists(st.integers(-50, 50), min_size=2, max_size=12).map(lambda items: torch.tensor(items).double())
VARIED = SCORES.filter(lambda scores: len(scores.unique()) > 1)


def _elements(seed=0):
    return torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "definition"),
    [
        ("sum", sum),
        ("max", max),
        ("l2", lambda items: math.sqrt(sum(x * x for x in items))),
        ("mean", lambda items: sum(items) / len(items)),
    ],
)
def test_inside(how, definition):
    expected = [definition(unit.flatten().tolist()) for unit in _elements()]
    assert reduction.inside(_elements(), how).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("how", "definition"),
    [
        ("sum", sum),
        ("mean", lambda items: sum(items) / len(items)),
        ("max", max),
        ("prod", math.prod),
        ("first", lambda items: items[0]),
        ("last", lambda items: items[-1]),
    ],
)
def test_across(how, definition):
    parts = list(_elements()[:, 0])
    expected = [definition([float(part[i]) for part in parts]) for i in range(3)]
    assert reduction.across(parts, how).tolist() == pytest.approx(expected)


class TestNormalised:
    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ("none", [3.0, -1.0, 1.0, 1.0]),
            ("zscore", [2 / math.sqrt(8 / 3), -2 / math.sqrt(8 / 3), 0.0, 0.0]),
            ("l2", [3 / math.sqrt(12), -1 / math.sqrt(12), 1 / math.sqrt(12), 1 / math.sqrt(12)]),
            ("minmax", [1.0, 0.0, 0.5, 0.5]),
            ("mean", [2.0, -1 / 1.5, 1 / 1.5, 1 / 1.5]),
            ("rank", [1.0, 0.0, 1 / 3, 1 / 3]),
        ],
    )
    def test_definition(self, how, expected):
        found = reduction.normalised(torch.tensor([3.0, -1.0, 1.0, 1.0]), how)
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("how", NORMALISATIONS)
    @given(scores=SCORES)
    def test_keeps_the_order(self, how, scores):
        found = reduction.normalised(scores, how)
        assert found.isfinite().all()
        assert torch.equal(found.argsort(stable=True), scores.argsort(stable=True))

    @pytest.mark.parametrize("how", NORMALISATIONS[1:])
    @given(scores=VARIED, scale=st.sampled_from([1e-3, 7.0, 1e6]))
    def test_does_not_depend_on_the_unit_of_the_scores(self, how, scores, scale):
        found = reduction.normalised(scale * scores, how)
        torch.testing.assert_close(found, reduction.normalised(scores, how), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("how", ["zscore", "minmax", "rank"])
    @given(scores=VARIED, shift=st.integers(-100, 100))
    def test_does_not_depend_on_their_origin(self, how, scores, shift):
        found = reduction.normalised(scores + shift, how)
        torch.testing.assert_close(found, reduction.normalised(scores, how), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("how", NORMALISATIONS)
    @pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [2.0, 2.0], [5.0]])
    def test_equal_scores_stay_finite_and_equal(self, how, scores):
        found = reduction.normalised(torch.tensor(scores), how)
        assert found.isfinite().all()
        assert len(found.unique()) == 1
