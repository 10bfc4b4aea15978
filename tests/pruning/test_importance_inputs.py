"""Criteria of input norms, votes and elementwise gradients against their definitions, and the recipes made of them."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from adasearch.config import component as parsed
from adasearch.library import REPOSITORY, load_recipe
from adasearch.pruning import calibration, importance, statistics
from adasearch.registry import IMPORTANCE
from tests.pruning.sample import activations, component, sample
from tests.pruning.test_importance import _features, _gradients, _scores
from tests.pruning.test_importance_more import INSIDE, _same

ACROSS = {"sum": sum, "mean": lambda s: sum(s) / len(s), "max": max, "prod": math.prod, "first": lambda s: s[0],
          "last": lambda s: s[-1]}  # fmt: skip


@functools.cache
def _whole(attention):
    """The shared sample with gradients by element, the gradients of each sequence, and norms of what matrices read."""
    case = sample(attention)
    more = calibration.collect(case.model, case.structure, case.tokens, statistics.LARGE)
    norms = {}
    for group in case.structure.groups:
        for part in group.slices:
            module = part.parameter.removesuffix(".weight")
            norms[part.parameter] = activations(case.model, module, case.tokens).square().mean(0).sqrt()
    held = statistics.union([case.statistics, more])
    return SimpleNamespace(**{**vars(case), "statistics": held}, gradients=_gradients(case), norms=norms)


@pytest.fixture(params=["kv_group", "head"])
def case(request):
    return _whole(request.param)


def _owned(part, matrix, unit):
    """Elements of a matrix that a unit owns, as a list."""
    rows = torch.arange(unit * part.block, (unit + 1) * part.block)
    return matrix.index_select(part.dim, rows).flatten().tolist()


def _check(case, scores, definition, rtol=1e-4):
    """Compare with `definition(group, unit)` for each unit; products may be tiny, so nothing counts as zero."""
    for group in case.structure.groups:
        expected = torch.tensor([definition(group, unit) for unit in range(group.units)], dtype=torch.float64)
        torch.testing.assert_close(scores[group.name].double(), expected, rtol=rtol, atol=0)


def _recipe(name):
    data = load_recipe(name, REPOSITORY / "studies" / "any.yaml", "recipes")["importance"]
    return parsed(IMPORTANCE, data, name)


class TestActNorm:
    def test_normalised_tokens(self, case):
        def definition(group, unit):
            x = activations(case.model, group.output, case.tokens)
            total = 0.0
            for row in x:
                total += sum(float(row[j]) ** 2 for j in _features(group, unit)) / float(row.square().sum())
            return math.sqrt(total)

        _check(case, _scores(case, "act_norm", average="normalised_tokens"), definition)

    def test_sequences(self, case):
        def definition(group, unit):
            x = activations(case.model, group.output, case.tokens).unflatten(0, case.tokens.shape)
            found = [sum(float(s[:, j].norm()) for s in x) for j in _features(group, unit)]
            return math.sqrt(sum(s * s for s in found))

        _check(case, _scores(case, "act_norm", average="sequences"), definition)

    def test_needs_follow_the_options(self):
        needs = {a: importance.needs(component("importance", "act_norm", average=a)) for a in ("tokens", "sequences")}
        assert needs == {"tokens": {"moments"}, "sequences": {"votes"}}


class TestProduct:
    def _definition(self, case, exponents, size, combine):
        alpha, beta, gamma = exponents
        inside, across = combine

        def matrix(name):
            w = case.weights[name].double().abs() ** alpha
            return w * case.norms[name] ** beta * size(case.gradients[name]) ** gamma

        def definition(group, unit):
            parts = [INSIDE[inside](_owned(part, matrix(part.parameter), unit)) for part in group.slices]
            return ACROSS[across](parts)

        return definition

    @pytest.mark.parametrize("exponents", [(1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.5, 1.0, 2.0)])
    @pytest.mark.parametrize("gradient", ["mean", "rms"])
    @pytest.mark.parametrize("combine", [("sum", "sum"), ("l2", "max"), ("max", "prod"), ("mean", "last")])
    def test_over_all_matrices(self, case, exponents, gradient, combine):
        sizes = {"mean": lambda g: g.sum(0).abs(), "rms": lambda g: g.square().sum(0).sqrt()}
        options = dict(zip(("alpha", "beta", "gamma", "inside", "across"), (*exponents, *combine), strict=True))
        found = _scores(case, "product", probe="all", gradient=gradient, **options)
        # Gradients are summed in float32.
        _check(case, found, self._definition(case, exponents, sizes[gradient], combine), rtol=1e-3)

    def test_scaled_gradients(self, case):
        def size(gradients):
            found = gradients.square().sum(0).sqrt()
            return (found - found.min()) / (found.max() - found.min())

        found = _scores(case, "product", alpha=2, beta=0, gamma=1, gradient="rms", scale="minmax", probe="all")
        _check(case, found, self._definition(case, (2, 0, 1), size, ("sum", "sum")), rtol=1e-3)
        pruner_zero = _recipe("pruner_zero_channels")
        _same(importance.score_all(case.structure, case.weights, case.statistics, pruner_zero, 0), found)

    def test_of_weight_and_mean_gradient_is_first_order_taylor(self, case):
        found = _scores(case, "product", alpha=1, beta=0, gamma=1, gradient="mean", probe="all")
        taylor = _scores(case, "taylor", order="first", grain="element")
        _same({name: s / len(case.tokens) for name, s in found.items()}, taylor, rtol=1e-4)

    def test_of_squares_is_second_order_taylor(self, case):
        found = _scores(case, "product", alpha=2, beta=0, gamma=2, gradient="rms", probe="all")
        taylor = _scores(case, "taylor", order="second")
        _same({name: s / len(case.tokens) for name, s in found.items()}, taylor, rtol=1e-4)

    def test_over_all_matrices_without_activations_is_magnitude(self, case):
        found = _scores(case, "product", alpha=1, beta=0, probe="all")
        _same(found, _scores(case, "magnitude", p=1, probe="all"))

    @pytest.mark.parametrize(
        ("options", "needs"),
        [
            ({}, {"moments"}),
            ({"probe": "all"}, {"moments", "inputs"}),
            ({"probe": "all", "beta": 0.0}, set()),
            ({"beta": 0.0, "gamma": 1.0}, {"gradient_sum"}),
            ({"gamma": 1.0, "gradient": "rms"}, {"moments", "square_sum"}),
        ],
    )
    def test_needs_follow_the_options(self, options, needs):
        assert importance.needs(component("importance", "product", **options)) == needs


def test_pca_direction(case):
    def definition(group, unit):
        w = case.weights[f"{group.output}.weight"].double()
        y = activations(case.model, group.output, case.tokens) @ w.T
        variances, directions = torch.linalg.eigh(torch.cov(y.T))
        weights = torch.sigmoid(variances / variances.mean())
        total = 0.0
        for part in group.slices:
            if part.parameter != f"{group.output}.weight":
                both = case.weights[part.parameter].double() * case.norms[part.parameter]
                total += math.sqrt(sum(x * x for x in _owned(part, both, unit)))
        down = 0.0
        for j in _features(group, unit):
            along = [abs(float(w[:, j] @ directions[:, k])) * float(weights[k]) for k in range(len(w))]
            down += (float(case.norms[f"{group.output}.weight"][j]) * math.sqrt(sum(x * x for x in along))) ** 2
        return total + math.sqrt(down)

    _check(case, _scores(case, "pca_direction"), definition)


class TestRecipes:
    def test_lorap_is_its_formula_with_the_lowest_spared(self):
        case = _whole("kv_group")
        recipe = _recipe("lorap_mlp")
        assert recipe.type == "spare_bottom"
        assert recipe.options.share == 0.01
        found = importance.score_all(case.structure, case.weights, case.statistics, recipe.options.of, 0)
        for group in (g for g in case.structure.groups if g.kind == "mlp"):
            gate, up, down = (f"{group.name}.{name}_proj.weight" for name in ("gate", "up", "down"))
            expected = (case.weights[gate] * case.norms[gate]).norm(dim=1)
            expected += (case.weights[up] * case.norms[up]).norm(dim=1)
            expected += (case.weights[down] * case.norms[down]).norm(dim=0)
            torch.testing.assert_close(found[group.name].double(), expected, rtol=1e-5, atol=0)

    def test_griffin_is_its_formula(self):
        case = _whole("kv_group")
        found = importance.score_all(case.structure, case.weights, case.statistics, _recipe("griffin_static"), 0)
        for group in (g for g in case.structure.groups if g.kind == "mlp"):
            z = activations(case.model, group.output, case.tokens)
            expected = (z / z.norm(dim=1, keepdim=True)).norm(dim=0)
            torch.testing.assert_close(found[group.name].double(), expected, rtol=1e-5, atol=0)
