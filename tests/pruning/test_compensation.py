"""Compensation does what it minimises: brute force on recorded activations of a tiny model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import TrialError
from adasearch.pruning import compensation, surgery
from adasearch.pruning.accumulators import damped
from adasearch.pruning.compensation.affine_out import scales
from adasearch.pruning.compensation.least_squares import solve
from adasearch.pruning.statistics import Statistics
from tests.pruning.sample import activations, component, sample
from tests.tiny import random_plan

TINY_DAMPING = 1e-12


def _cut(case, name, widths=None, **options):
    """A model cut at random, its plan, and the same after compensation."""
    made = component("compensation", name, **options)
    widths = widths or {g.name: max(1, g.width * 2 // 3) for g in case.structure.groups}
    biases = compensation.bias_modules(made, case.structure)
    plan = random_plan(case.structure, case.units, widths, biases=biases)
    models = [surgery.cut(case.config, case.weights, case.structure, plan) for _ in range(2)]
    compensation.apply(models[1], case.structure, plan, case.statistics, case.weights, made)
    return plan, *models


def _problem(case, plan, group):
    """Dense features (T × F), dense weight (D × F) and which features stay."""
    x = activations(case.model, group.output, case.tokens)
    stays = torch.zeros(group.units, dtype=torch.bool)
    stays[list(plan.keep[group.name])] = True
    return x, case.weights[f"{group.output}.weight"].double(), stays.repeat_interleave(group.output_block)


def _close(a, b, rtol=1e-4, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.fixture(params=["kv_group", "head"])
def case(request):
    return sample(request.param)


class TestNone:
    def test_changes_nothing(self, case):
        _, plain, model = _cut(case, "none")
        for (name, a), (_, b) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert torch.equal(a, b), name


class TestBias:
    def test_adds_the_mean_output_of_what_is_gone(self, case):
        plan, plain, model = _cut(case, "bias")
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            module = model.get_submodule(group.output)
            expected = torch.zeros(24, dtype=torch.float64)
            for j in range(len(stays)):
                if not stays[j]:
                    expected += w[:, j] * x[:, j].mean()
            _close(module.bias.detach(), expected)
            assert torch.equal(module.weight, plain.get_submodule(group.output).weight)

    def test_the_mean_output_is_the_dense_one(self, case):
        plan, _, model = _cut(case, "bias")
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            module = model.get_submodule(group.output)
            _close(module(x[:, stays]).mean(0).detach(), (x @ w.T).mean(0))

    def test_a_bias_that_was_there_is_kept(self):
        case = sample()
        plan, _, model = _cut(case, "bias")
        again = surgery.cut(case.config, case.weights, case.structure, plan)
        for group in case.structure.groups:
            torch.nn.init.ones_(again.get_submodule(group.output).bias)
        compensation.apply(
            again, case.structure, plan, case.statistics, case.weights, component("compensation", "bias")
        )
        for group in case.structure.groups:
            _close(again.get_submodule(group.output).bias, model.get_submodule(group.output).bias + 1)

    def test_groups_that_lost_nothing_have_a_zero_bias(self):
        case = sample()
        widths = {"model.layers.0.mlp": 10}
        _, _, model = _cut(case, "bias", widths)
        for group in case.structure.groups:
            bias = model.get_submodule(group.output).bias
            assert bool(bias.any()) == (group.name in widths)


class TestLeastSquares:
    def test_is_lstsq_as_damping_vanishes(self, case):
        plan, _, model = _cut(case, "least_squares", damping=TINY_DAMPING)
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            best = torch.linalg.lstsq(x[:, stays], x @ w.T, driver="gelsd").solution
            found = model.get_submodule(group.output).weight.detach()
            _close(x[:, stays] @ found.T, x[:, stays] @ best, rtol=1e-3, atol=1e-3)

    def test_with_bias_is_lstsq_with_a_column_of_ones(self, case):
        plan, _, model = _cut(case, "least_squares", damping=TINY_DAMPING, with_bias=True)
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            ones = torch.cat([x[:, stays], torch.ones(len(x), 1, dtype=torch.float64)], 1)
            best = ones @ torch.linalg.lstsq(ones, x @ w.T, driver="gelsd").solution
            _close(model.get_submodule(group.output)(x[:, stays]).detach(), best, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("with_bias", [False, True])
    def test_no_change_of_the_weights_does_better(self, case, with_bias):
        """Directional check of the minimum of the damped objective, on activations, without its formula."""
        damping = 0.05
        plan, _, model = _cut(case, "least_squares", damping=damping, with_bias=with_bias)
        generator = torch.Generator().manual_seed(0)
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            x = x - x.mean(0) if with_bias else x
            pull = damping * x.square().mean(0).mean()

            def objective(weight, x=x, w=w, stays=stays, pull=pull):
                error = (x @ w.T - x[:, stays] @ weight.T).square().sum() / len(x)
                return float(error + pull * (weight - w[:, stays]).square().sum())

            found = model.get_submodule(group.output).weight.detach().double()
            least = objective(found)
            for _ in range(10):
                step = torch.randn(found.shape, generator=generator, dtype=torch.float64) * 0.01
                assert objective(found + step) > least
            assert least <= objective(w[:, stays])

    def test_leaves_less_error_than_affine_and_so_on_to_none(self, case):
        errors = {}
        simple = (("none", {}), ("bias", {}), ("affine_out", {}))
        for name, options in (*simple, ("least_squares", {"with_bias": True, "damping": 1e-6})):
            plan, _, model = _cut(case, name, **options)
            for group in case.structure.groups:
                x, w, stays = _problem(case, plan, group)
                error = (model.get_submodule(group.output)(x[:, stays]) - x @ w.T).square().sum()
                errors.setdefault(group.name, []).append(float(error.detach()))
        for none, bias, affine, best in errors.values():
            assert best < affine < bias < none

    def test_a_model_in_bfloat16_is_solved_in_float64(self):
        case = sample(dtype=torch.bfloat16)
        exact = sample()
        plan, _, model = _cut(case, "least_squares")
        for group in exact.structure.groups:
            _, w, stays = _problem(exact, plan, group)
            h = damped(exact.statistics.covariance(group.output).matrix(), 0.01)
            found = model.get_submodule(group.output).weight
            assert found.dtype == torch.bfloat16
            _close(found.double(), solve(w, h, stays), rtol=0.1, atol=0.1)

    @given(st.integers(0, 2**31), st.integers(2, 8), st.data())
    def test_one_by_one_block_by_block_and_at_once_are_the_same(self, seed, features, data):
        """Removal by the optimal brain surgeon, sequential or block by block, ends in the least squares fit."""
        gone = data.draw(st.lists(st.integers(0, features - 1), min_size=1, max_size=features - 1, unique=True))
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, features, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(features, features, generator=generator, dtype=torch.float64)
        w = torch.randn(5, features, generator=generator, dtype=torch.float64)
        h = damped(x.T @ x, 0.01)
        stays = torch.ones(features, dtype=torch.bool)
        stays[gone] = False
        left, inverse, total = w.clone(), torch.linalg.inv(h), 0.0
        for j in gone:
            total += float(left[:, j].square().sum() / inverse[j, j])
            left -= torch.outer(left[:, j] / inverse[j, j], inverse[j])
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, :] = inverse[:, j] = 0
        start = torch.linalg.inv(h)
        core = torch.linalg.inv(start[gone][:, gone])
        block = w - w[:, gone] @ core @ start[gone]
        fit = torch.zeros_like(w)
        fit[:, stays] = solve(w, h, stays)
        _close(left, fit, rtol=1e-6, atol=1e-7)
        _close(block, fit, rtol=1e-6, atol=1e-7)
        loss = float(torch.trace((w - fit) @ h @ (w - fit).T))
        assert total == pytest.approx(loss, rel=1e-6)
        assert float(torch.trace(w[:, gone] @ core @ w[:, gone].T)) == pytest.approx(loss, rel=1e-6)

    def test_a_matrix_that_has_no_inverse_is_an_error(self):
        stays = torch.tensor([True, True, False])
        with pytest.raises(TrialError, match=r"nan while in phase compensate: .* raise least_squares.damping"):
            solve(torch.ones(2, 3), torch.zeros(3, 3), stays)


class TestAffineOut:
    def test_is_a_line_fitted_to_each_output(self, case):
        plan, plain, model = _cut(case, "affine_out")
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            before, want = x[:, stays] @ w[:, stays].T, x @ w.T
            module = model.get_submodule(group.output)
            after = module(x[:, stays]).detach()
            for i in range(len(w)):
                line = torch.stack([before[:, i], torch.ones(len(x), dtype=torch.float64)], 1)
                slope, shift = torch.linalg.lstsq(line, want[:, i : i + 1]).solution.flatten()
                _close(after[:, i], slope * before[:, i] + shift, rtol=1e-3, atol=1e-4)
                cut = plain.get_submodule(group.output).weight[i]
                _close(module.weight[i].detach(), slope * cut, rtol=1e-3, atol=1e-4)

    def test_the_mean_output_is_the_dense_one_and_what_is_left_is_uncorrelated(self, case):
        plan, _, model = _cut(case, "affine_out")
        for group in case.structure.groups:
            x, w, stays = _problem(case, plan, group)
            found, want = model.get_submodule(group.output)(x[:, stays]).detach(), x @ w.T
            _close(found.mean(0), want.mean(0))
            rest = want - found
            _close((rest * (found - found.mean(0))).mean(0), torch.zeros(len(w), dtype=torch.float64), atol=1e-4)

    def test_a_bias_that_was_there_is_kept(self):
        case = sample()
        plan, _, model = _cut(case, "affine_out")
        again = surgery.cut(case.config, case.weights, case.structure, plan)
        for group in case.structure.groups:
            torch.nn.init.ones_(again.get_submodule(group.output).bias)
        made = component("compensation", "affine_out")
        compensation.apply(again, case.structure, plan, case.statistics, case.weights, made)
        for group in case.structure.groups:
            _close(again.get_submodule(group.output).bias, model.get_submodule(group.output).bias + 1)

    def test_an_output_that_never_varies_keeps_its_scale(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
        x[:, :2] = torch.tensor([3.0, -2.0])
        x[:, 0] += 1e-5 * x[:, 3]  # below what float32 sums resolve
        dense = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        dense[2, :2] = 0
        stays = torch.tensor([True, True, False, False])
        assert torch.equal(scales(dense, x.T @ x / 50, x.mean(0), stays), torch.ones(3, dtype=torch.float64))


class TestApply:
    def test_statistics_that_are_not_finite_are_an_error(self):
        case = sample()
        plan, _, model = _cut(case, "bias")
        bad = {k: torch.full_like(t, torch.inf) for k, t in case.statistics.tensors.items()}
        made = component("compensation", "bias")
        with pytest.raises(TrialError, match="must be finite"):
            compensation.apply(model, case.structure, plan, Statistics(tokens=1, tensors=bad), case.weights, made)

    def test_needs_and_biases_follow_the_options(self):
        structure = sample().structure
        plain, centred = (component("compensation", "least_squares", with_bias=b) for b in (False, True))
        assert compensation.bias_modules(plain, structure) == ()
        assert compensation.bias_modules(centred, structure) == tuple(sorted(g.output for g in structure.groups))
        assert compensation.needs(plain) == {"covariance"}
        assert compensation.needs(component("compensation", "none")) == frozenset()
