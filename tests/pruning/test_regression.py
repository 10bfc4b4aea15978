"""Importance by regression: masks keep their counts, and an additive loss is taken apart again."""

import pytest
import torch

from adasearch.pruning import regression
from adasearch.pruning.regression import RegressionOptions

UNITS = 40


def _prior(seed=0):
    return torch.rand(UNITS, generator=torch.Generator().manual_seed(seed))


class TestMasks:
    @pytest.mark.parametrize("fraction", [0.05, 0.2, 0.45])
    def test_each_removes_its_share_and_comes_with_its_complement(self, fraction):
        masks = regression.sample_masks(_prior(), fraction, 20, seed=1)
        assert masks.shape == (20, UNITS)
        removed = round(fraction * UNITS)
        assert set((~masks).sum(1).tolist()) == {removed}
        weakest = torch.sort(_prior()).indices[: 2 * removed]
        for one, other in masks.view(10, 2, UNITS):
            assert torch.equal(~one[weakest], other[weakest])
        strong = torch.ones(UNITS, dtype=torch.bool)
        strong[weakest] = False
        assert masks[:, strong].all()

    def test_lower_priors_go_more_often(self):
        prior = torch.linspace(0, 1, UNITS)
        gone = (~regression.sample_masks(prior, 0.4, 4000, seed=0)[::2]).double().mean(0)
        tried = gone[:32]
        assert gone[32:].sum() == 0
        assert (tried > 0).all()
        assert tried[:8].mean() > tried[8:16].mean() > tried[16:24].mean() > tried[24:].mean()

    def test_equal_priors_and_many_masks(self):
        masks = regression.sample_masks(torch.ones(UNITS), 0.5, 7, seed=0)
        assert masks.shape == (8, UNITS)
        assert set((~masks).sum(1).tolist()) == {UNITS // 2}

    def test_follow_their_seed(self):
        one, same, other = (regression.sample_masks(_prior(), 0.2, 6, seed) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class TestCoefficients:
    def test_equal_ridge_regression_by_brute_force(self):
        generator = torch.Generator().manual_seed(0)
        masks = torch.rand(30, 6, generator=generator) > 0.4
        losses = torch.rand(30, generator=generator, dtype=torch.float64)
        x, ridge = masks.double(), 0.3
        weight = ridge * float((x - x.mean(0)).square().mean())
        beta = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        objective = (losses - x @ beta[:6] - beta[6]).square().mean() + weight * beta[:6].square().sum()
        (gradient,) = torch.autograd.grad(objective, beta, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, beta, retain_graph=True)[0] for g in gradient])
        exact = -torch.linalg.solve(hessian, gradient.detach())
        torch.testing.assert_close(regression.coefficients(masks, losses, ridge), -exact[:6])

    def test_units_that_all_masks_keep_are_beyond_comparison(self):
        masks = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()
        found = regression.coefficients(masks, torch.tensor([3.0, 2.0, 1.0, 4.0]), 0.0)
        torch.testing.assert_close(found, torch.tensor([1.0, 2.0, torch.inf], dtype=torch.float64))


class TestImportance:
    @pytest.mark.parametrize("seed", range(3))
    def test_recovers_an_additive_loss(self, seed):
        """All masks remove as many units, so what they tell are differences: the mean of those tried stays unknown."""
        worth = torch.rand(UNITS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def loss(mask):
            return 2.0 + float(worth[~mask].sum())

        options = RegressionOptions(fraction=0.25, masks=200, ridge=0.0)
        found = regression.importance(_prior(seed), loss, options, seed)
        tried = found.isfinite()
        assert torch.equal(tried.nonzero()[:, 0], regression.tried_units(_prior(seed), 0.25))
        exact = worth[tried] - worth[tried].mean()
        torch.testing.assert_close(found[tried] - found[tried].mean(), exact, atol=1e-8, rtol=0)

    def test_an_overflow_counts_as_the_worst(self):
        prior = torch.arange(4.0)

        def loss(mask):
            return float("nan") if not mask[0] else 1.0

        found = regression.importance(prior, loss, RegressionOptions(fraction=0.25, masks=4), 0)
        assert found[:2].isfinite().all()
        assert found[2:].isinf().all()
        found = regression.importance(prior, lambda _: float("inf"), RegressionOptions(fraction=0.25, masks=4), 0)
        assert found[:2].abs().max() == 0
