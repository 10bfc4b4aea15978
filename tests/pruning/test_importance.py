"""Every criterion against its definition, in explicit loops, on a tiny model; and the identities between them."""

import math

import pytest
import torch

from adasearch import models
from adasearch.config import component as parsed
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning import architectures, importance, surgery
from adasearch.pruning.accumulators import damped
from adasearch.pruning.importance import GroupView
from adasearch.pruning.plan import make_plan
from adasearch.registry import IMPORTANCE
from adasearch.sections import UnitsConfig
from tests.pruning.sample import activations, component, sample, sequence_gradients

UNITS = ["kv_group", "head"]


def _scores(case, name, **options):
    return importance.score_all(
        case.structure, case.weights, case.statistics, component("importance", name, **options), 0
    )


def _parts(case, group, unit):
    """Part of each matrix that a unit owns, by parameter name."""
    found = {}
    for part in group.slices:
        rows = range(unit * part.block, (unit + 1) * part.block)
        found[part.parameter] = case.weights[part.parameter].double().index_select(part.dim, torch.tensor(rows))
    return found


def _features(group, unit):
    return range(unit * group.output_block, (unit + 1) * group.output_block)


def _check(case, scores, definition, rtol=1e-4):
    """Compare with `definition(group, unit)` for each unit."""
    for group in case.structure.groups:
        expected = torch.tensor([definition(group, unit) for unit in range(group.units)], dtype=torch.float64)
        torch.testing.assert_close(scores[group.name].double(), expected, rtol=rtol, atol=1e-9)


@pytest.fixture(params=UNITS)
def case(request):
    return sample(request.param)


class TestDefinitions:
    @pytest.mark.parametrize("p", [1, 2])
    @pytest.mark.parametrize("probe", ["all", "output"])
    def test_magnitude(self, case, p, probe):
        def definition(group, unit):
            total = 0.0
            for name, part in _parts(case, group, unit).items():
                if probe == "all" or name == f"{group.output}.weight":
                    total += float((part.abs() ** p).sum())
            return total

        _check(case, _scores(case, "magnitude", p=p, probe=probe), definition)

    def test_wanda_sp(self, case):
        def definition(group, unit):
            x, w = activations(case.model, group.output, case.tokens), case.weights[f"{group.output}.weight"]
            total = 0.0
            for j in _features(group, unit):
                norm = math.sqrt(float((x[:, j] ** 2).mean()))
                total += sum(abs(float(w[i, j])) * norm for i in range(w.shape[0]))
            return total

        _check(case, _scores(case, "wanda_sp"), definition)

    @pytest.mark.parametrize("metric", ["wifv", "ifv", "wifn"])
    @pytest.mark.parametrize("standardise", [True, False])
    def test_flap(self, case, metric, standardise):
        def feature_scores(group):
            x, w = activations(case.model, group.output, case.tokens), case.weights[f"{group.output}.weight"]
            var, norm = x.var(0, unbiased=False), x.square().mean(0).sqrt()
            found = {"wifv": var * w.square().sum(0), "ifv": var, "wifn": w.abs().mean(0) * norm}[metric]
            found = found**2 if group.kind == "attention" else found
            return (found - found.mean()) / found.std() if standardise else found

        def definition(group, unit):
            found = feature_scores(group)
            return sum(float(found[j]) for j in _features(group, unit)) / group.output_block

        _check(case, _scores(case, "flap", metric=metric, standardise=standardise), definition)

    @pytest.mark.parametrize("order", ["first", "second", "mix"])
    @pytest.mark.parametrize("grain", ["element", "vector"])
    @pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "first", "last"])
    def test_taylor(self, case, order, grain, reduce):
        gradients = _gradients(case)
        combine = {"sum": sum, "mean": lambda s: sum(s) / len(s), "max": max, "prod": math.prod,
                   "first": lambda s: s[0], "last": lambda s: s[-1]}[reduce]  # fmt: skip

        def definition(group, unit):
            found = []
            for part in group.slices:
                w, g = case.weights[part.parameter].double(), gradients[part.parameter]
                first, second = w * g.mean(0), w * w * g.square().mean(0)
                s = {"first": first, "second": second, "mix": first - second / 2}[order]
                rows = s.movedim(part.dim, 0)[unit * part.block : (unit + 1) * part.block]
                found.append(sum(float(r.abs().sum() if grain == "element" else r.sum().abs()) for r in rows))
            return combine(found)

        _check(case, _scores(case, "taylor", order=order, grain=grain, reduce=reduce), definition, rtol=1e-3)

    def test_taylor_of_the_output_alone(self, case):
        last = _scores(case, "taylor", probe="output", reduce="sum")
        for name, scores in _scores(case, "taylor", reduce="last").items():
            assert torch.equal(scores, last[name])

    @pytest.mark.parametrize("damping", [0.01, 0.5])
    def test_obs_is_the_error_that_least_squares_leaves(self, case, damping):
        def definition(group, unit):
            w = case.weights[f"{group.output}.weight"].double()
            h = damped(case.statistics.covariance(group.output).matrix(), damping)
            keep = torch.tensor([j not in _features(group, unit) for j in range(len(h))])
            best = torch.zeros_like(w)
            best[:, keep] = torch.linalg.solve(h[keep][:, keep], h[keep] @ w.T).T
            return float(torch.trace((w - best) @ h @ (w - best).T))

        _check(case, _scores(case, "obs", damping=damping), definition)

    def test_random_depends_on_seed_and_group_only(self, case):
        structure, options = case.structure, component("importance", "random")
        one, again, other = (importance.score_all(structure, {}, None, options, seed) for seed in (1, 1, 2))
        for group in structure.groups:
            alone = GroupView(group=group, weights={}, statistics=None, seed=1)
            assert torch.equal(one[group.name], again[group.name])
            assert torch.equal(one[group.name], IMPORTANCE.get("random").function(alone, options.options))
            assert not torch.equal(one[group.name], other[group.name])
        first, second = structure.groups[1].name, structure.groups[3].name
        assert not torch.equal(one[first], one[second])


def _gradients(case):
    """Per-sequence gradients on a copy of the shared model."""
    dense = make_plan(case.structure, case.units, {}, {})
    return sequence_gradients(surgery.cut(case.config, case.weights, case.structure, dense), case.tokens)


class TestIdentities:
    """methods: gate gradients, FLAP as an error, OBS block by block."""

    def _signed(self, case, name):
        part = next(s for g in case.structure.groups for s in g.slices if s.parameter == name)
        return case.statistics.rows("gradient", name, "signed"), part

    def test_up_and_down_are_the_gradient_of_one_gate(self):
        case = sample()
        for layer in range(2):
            up, _ = self._signed(case, f"model.layers.{layer}.mlp.up_proj.weight")
            down, _ = self._signed(case, f"model.layers.{layer}.mlp.down_proj.weight")
            gate, _ = self._signed(case, f"model.layers.{layer}.mlp.gate_proj.weight")
            torch.testing.assert_close(up, down, rtol=1e-3, atol=1e-7)
            assert not torch.allclose(gate, down, rtol=1e-2)

    def test_value_and_output_are_the_gradient_of_one_gate(self):
        case = sample()
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn"
            v, part = self._signed(case, f"{at}.v_proj.weight")
            o, _ = self._signed(case, f"{at}.o_proj.weight")
            # Two query heads of a KV group read the same value rows.
            torch.testing.assert_close(v.view(3, part.block), o.view(3, 2, 8).sum(1), rtol=1e-3, atol=1e-7)

    def test_query_and_key_are_equal_by_group(self):
        case = sample()
        at = "model.layers.1.self_attn"
        q, k = (self._signed(case, f"{at}.{name}.weight")[0] for name in ("q_proj", "k_proj"))
        torch.testing.assert_close(q.view(3, -1).sum(1), k.view(3, -1).sum(1), rtol=1e-3, atol=1e-7)

    def test_gate_gradient_by_autograd(self):
        case = sample()
        name = "model.layers.0.mlp.down_proj"
        gate = torch.ones(40, dtype=torch.float64, requires_grad=True)
        handle = case.model.get_submodule(name).register_forward_pre_hook(lambda _, args: (args[0] * gate,))
        logits = case.model(input_ids=case.tokens, use_cache=False).logits[:, :-1]
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), case.tokens[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, gate)
        torch.testing.assert_close(self._signed(case, f"{name}.weight")[0], gradient, rtol=1e-3, atol=1e-7)

    def test_flap_is_the_error_of_replacing_a_feature_by_its_mean(self):
        case = sample()
        scores = _scores(case, "flap", standardise=False)
        for group in (g for g in case.structure.groups if g.kind == "mlp"):
            x = activations(case.model, group.output, case.tokens)
            w = case.weights[f"{group.output}.weight"]
            for j in range(0, group.units, 7):
                error = (x[:, [j]] - x[:, j].mean()) @ w[:, [j]].T
                torch.testing.assert_close(
                    float(scores[group.name][j]), float(error.square().sum(1).mean()), rtol=1e-4, atol=0
                )

    def test_removing_one_by_one_ends_where_a_block_does(self):
        case = sample()
        scores = _scores(case, "obs")
        group = case.structure.group("model.layers.0.self_attn")
        w = case.weights[f"{group.output}.weight"].clone()
        inverse = torch.linalg.inv(damped(case.statistics.covariance(group.output).matrix(), 0.01))
        total = 0.0
        for j in _features(group, 1):
            total += float((w[:, j] ** 2).sum() / inverse[j, j])
            w -= torch.outer(w[:, j] / inverse[j, j], inverse[j])
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        assert math.isclose(total, float(scores[group.name][1]), rel_tol=1e-4)


class TestScoreAll:
    def test_a_score_that_is_not_finite_is_an_error(self):
        case = sample()
        weights = dict(case.weights)
        weights["model.layers.1.mlp.down_proj.weight"] = torch.full((24, 40), float("inf"))
        with pytest.raises(TrialError, match=r"scores of .*1.mlp must be finite"):
            importance.score_all(case.structure, weights, None, component("importance", "magnitude"), 0)

    def test_needs_follow_the_options(self):
        assert importance.needs(component("importance", "magnitude")) == frozenset()
        assert importance.needs(component("importance", "taylor")) == {"gradient"}
        assert importance.needs(component("importance", "taylor", order="mix")) == {"fisher"}
        assert importance.needs(component("importance", "obs")) == {"covariance"}

    def test_options_are_checked(self):
        with pytest.raises(ConfigError, match="grain"):
            parsed(IMPORTANCE, {"type": "taylor", "grain": "matrix"}, "trial.importance")
        assert parsed(IMPORTANCE, {"type": "magnitude", "p": 1}, "").options.p == 1

    def test_no_attention_units_no_attention_scores(self):
        case = sample()
        structure = architectures.describe(models.shape_of(case.config), UnitsConfig(attention="none"))
        found = importance.score_all(structure, case.weights, case.statistics, component("importance", "wanda_sp"), 0)
        assert all(name.endswith("mlp") for name in found)

    def test_equal_features_have_equal_flap_scores(self):
        case = sample()
        flat = {k: torch.ones_like(t) for k, t in case.statistics.tensors.items()}
        same = type(case.statistics)(tokens=case.statistics.tokens, tensors=flat)
        found = importance.score_all(
            case.structure, case.weights, same, component("importance", "flap", metric="ifv"), 0
        )
        assert all(torch.equal(s, torch.zeros_like(s)) for s in found.values())
