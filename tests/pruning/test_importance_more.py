"""Criteria of norms, products, mixtures and correlations against their definitions, and the identities between them."""

import math
from types import SimpleNamespace

import pytest
import torch

from adasearch.config import Component, TrialConfig
from adasearch.config import component as parsed
from adasearch.errors import ConfigError
from adasearch.pruning import importance
from adasearch.pruning.plan import make_plan
from adasearch.pruning.reduction import normalised
from adasearch.pruning.statistics import Statistics
from adasearch.registry import IMPORTANCE
from tests.pruning.sample import activations, component, sample
from tests.pruning.test_importance import _check, _features, _scores

INSIDE = {"sum": sum, "max": max, "mean": lambda s: sum(s) / len(s), "l2": lambda s: math.sqrt(sum(x * x for x in s))}


@pytest.fixture(params=["kv_group", "head"])
def case(request):
    return sample(request.param)


def _same(a, b, rtol=1e-6):
    assert a.keys() == b.keys()
    for group, scores in a.items():
        torch.testing.assert_close(scores, b[group], rtol=rtol, atol=0)


class TestDefinitions:
    def test_act_norm(self, case):
        def definition(group, unit):
            x = activations(case.model, group.output, case.tokens)
            return math.sqrt(sum(float((x[:, j] ** 2).mean()) for j in _features(group, unit)))

        _check(case, _scores(case, "act_norm"), definition)

    @pytest.mark.parametrize("inside", INSIDE)
    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (2.0, 0.0), (0.0, 1.0)])
    def test_product(self, case, alpha, beta, inside):
        def definition(group, unit):
            x, w = activations(case.model, group.output, case.tokens), case.weights[f"{group.output}.weight"]
            norms = x.square().mean(0).sqrt()
            found = [
                abs(float(w[i, j])) ** alpha * float(norms[j]) ** beta
                for j in _features(group, unit)
                for i in range(len(w))
            ]
            return INSIDE[inside](found)

        _check(case, _scores(case, "product", alpha=alpha, beta=beta, inside=inside), definition)

    @pytest.mark.parametrize("normalise", ["none", "zscore", "rank"])
    def test_mix(self, case, normalise):
        first, second = component("importance", "wanda_sp"), component("importance", "magnitude", p=1)
        found = _scores(case, "mix", first=first, second=second, share=0.3, normalise=normalise)
        one, other = _scores(case, "wanda_sp"), _scores(case, "magnitude", p=1)
        for group, scores in found.items():
            expected = 0.7 * normalised(one[group], normalise) + 0.3 * normalised(other[group], normalise)
            torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)

    def test_by_kind(self, case):
        options = {"mlp": component("importance", "magnitude"), "attention": component("importance", "act_norm")}
        found = _scores(case, "by_kind", **options)
        expected = {"mlp": _scores(case, "magnitude"), "attention": _scores(case, "act_norm")}
        for group in case.structure.groups:
            assert torch.equal(found[group.name], expected[group.kind][group.name])

    @pytest.mark.parametrize(("share", "spared"), [(0.0, 0), (0.01, 0), (0.08, 3), (1.0, 40)])
    def test_spare_bottom(self, case, share, spared):
        inner = _scores(case, "wanda_sp")
        found = _scores(case, "spare_bottom", of=component("importance", "wanda_sp"), share=share)
        for group in case.structure.groups:
            order = inner[group.name].argsort(stable=True).tolist()
            cut = spared if group.kind == "mlp" else 0
            assert found[group.name].argsort(stable=True).tolist() == order[cut:] + order[:cut]
            if not cut:
                assert torch.equal(found[group.name], inner[group.name])

    def test_head_correlation(self, case):
        def definition(group, unit):
            x = activations(case.model, group.output, case.tokens)
            w = case.weights[f"{group.output}.weight"].double()
            y = x @ w.T
            columns = list(_features(group, unit))
            without = y - x[:, columns] @ w[:, columns].T
            both = [torch.corrcoef(torch.stack([y[:, i], without[:, i]]))[0, 1] for i in range(y.shape[1])]
            return sum(1 - abs(float(c)) for c in both)

        _check(case, _scores(case, "head_correlation"), definition, rtol=1e-3)


class TestIdentities:
    """One family: weights, activations and their products (methods: the family of `stat^(p/2) ||W||_p^p`)."""

    def test_product_of_weight_and_norm_is_wanda_sp(self, case):
        _same(_scores(case, "product", alpha=1, beta=1, inside="sum"), _scores(case, "wanda_sp"))

    @pytest.mark.parametrize("p", [1, 2])
    def test_product_without_activations_is_magnitude(self, case, p):
        expected = _scores(case, "magnitude", p=p, probe="output")
        _same(_scores(case, "product", alpha=p, beta=0, inside="sum"), expected)

    def test_product_of_squares_is_flap_where_means_are_zero(self, case):
        still = {k: torch.zeros_like(t) if k.endswith("/mean") else t for k, t in case.statistics.tensors.items()}
        centred = SimpleNamespace(**{**vars(case), "statistics": Statistics(tokens=60, tensors=still)})
        flap = _scores(centred, "flap", attn_power=1.0, standardise=False)
        product = _scores(centred, "product", alpha=2, beta=2, inside="sum")
        blocks = {group.name: group.output_block for group in case.structure.groups}
        _same({name: scores / blocks[name] for name, scores in product.items()}, flap)

    def test_norm_of_a_products_column_is_norm_times_norm(self):
        case = sample()
        found, norms = _scores(case, "product", alpha=1, beta=1, inside="l2"), _scores(case, "act_norm")
        for group in (g for g in case.structure.groups if g.kind == "mlp"):
            columns = case.weights[f"{group.output}.weight"].double().norm(dim=0)
            torch.testing.assert_close(found[group.name].double(), norms[group.name] * columns, rtol=1e-5, atol=1e-9)

    @pytest.mark.parametrize("power", [1.0, 0.5])
    def test_released_score_of_cfsp_is_a_power_of_the_activation_norm(self, power):
        case = sample()
        scores = _scores(case, "act_norm")
        for group in (g for g in case.structure.groups if g.kind == "mlp"):
            n = activations(case.model, group.output, case.tokens).square().mean(0).sqrt()
            down, up, gate = (
                case.weights[f"{group.name}.{name}_proj.weight"].double().abs() for name in ("down", "up", "gate")
            )
            terms = [matrix / matrix.sum(0) for matrix in (down * n**power, up.T, gate.T)]
            released = sum(terms).mean(0) * n**power
            expected = 3 / len(down) * scores[group.name].double() ** power
            torch.testing.assert_close(released, expected, rtol=1e-5, atol=0)

    @pytest.mark.parametrize(("share", "which"), [(0.0, "taylor"), (1.0, "magnitude")])
    def test_mix_at_its_ends_is_one_criterion(self, case, share, which):
        parts = {"first": component("importance", "taylor"), "second": component("importance", "magnitude")}
        _same(_scores(case, "mix", **parts, share=share, normalise="none"), _scores(case, which))

    def test_a_unit_that_is_the_whole_output_correlates_with_nothing_left(self):
        case = sample()
        group = case.structure.group("model.layers.0.mlp")
        weights = {**case.weights, f"{group.output}.weight": case.weights[f"{group.output}.weight"].clone()}
        weights[f"{group.output}.weight"][:, 1:] = 0
        alone = SimpleNamespace(**{**vars(case), "weights": weights})
        scores = _scores(alone, "head_correlation")[group.name]
        assert float(scores[0]) == pytest.approx(24.0, abs=1e-3)
        assert scores[1:].abs().max() < 1e-6


class TestSparedChannelsInAPlan:
    def test_a_plan_keeps_the_lowest_and_the_highest(self):
        case = sample()
        of = component("importance", "act_norm")
        scores = _scores(case, "spare_bottom", of=of, share=0.08)
        order = {name: inner.argsort().tolist() for name, inner in _scores(case, "act_norm").items()}
        widths = {"model.layers.0.mlp": 30, "model.layers.1.self_attn": 2}
        plan = make_plan(case.structure, case.units, scores, widths)
        mlp, attention = order["model.layers.0.mlp"], order["model.layers.1.self_attn"]
        assert plan.keep["model.layers.0.mlp"] == tuple(sorted(mlp[:3] + mlp[-27:]))
        assert plan.keep["model.layers.1.self_attn"] == tuple(sorted(attention[-2:]))


class TestCriteriaInCriteria:
    MIX = {
        "type": "mix",
        "first": {"type": "spare_bottom", "of": {"type": "taylor", "order": "mix"}, "share": 0.02},
        "second": "obs",
        "share": 0.25,
    }

    def test_read_and_written_back(self):
        config = TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, "importance": self.MIX}, "t")
        written = config.to_dict()["importance"]
        assert written["first"]["of"]["type"] == "taylor"
        assert written["first"]["of"]["order"] == "mix"
        assert written["second"] == {"type": "obs", "damping": 0.01}
        again = TrialConfig.from_dict(config.to_dict(), "t")
        assert again == config
        assert again.key == config.key

    def test_need_what_their_parts_need(self):
        assert importance.needs(parsed(IMPORTANCE, self.MIX, "")) == {"fisher", "covariance"}
        both = {"type": "by_kind", "mlp": "magnitude", "attention": "act_norm"}
        assert importance.needs(parsed(IMPORTANCE, both, "")) == {"moments"}
        assert importance.needs(component("importance", "product", beta=0.0)) == frozenset()

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            ({"type": "taylor", "grian": "vector"}, r"importance\.first: .*unknown key 'grian'; did you mean 'grain'"),
            ("taylr", r"importance\.first: .*unknown importance criterion 'taylr'; did you mean 'taylor'"),
            (3, r"importance\.first: .*must be a name or a mapping"),
        ],
    )
    def test_what_is_wrong_inside_is_said_with_its_place(self, part, message):
        with pytest.raises(ConfigError, match=message):
            parsed(IMPORTANCE, {"type": "mix", "first": part}, "importance")

    def test_a_component_is_taken_as_it_is(self):
        inner = Component(type="obs", options=IMPORTANCE.get("obs").options(damping=0.5))
        assert parsed(IMPORTANCE, {"type": "mix", "first": inner}, "").options.first is inner
