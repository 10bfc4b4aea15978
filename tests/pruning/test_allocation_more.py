"""Allocations of published methods: their formulas by brute force on a tiny model, and what must hold on any."""

import dataclasses
import functools
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.config import TrialConfig
from adasearch.errors import ConfigError, TrialError
from adasearch.library import REPOSITORY, load_recipe
from adasearch.pruning import allocation, calibration, compensation, importance, surgery
from adasearch.pruning.allocation import AllocationContext, alpha_tail
from adasearch.pruning.plan import make_plan
from adasearch.pruning.projection import project, removal
from adasearch.pruning.statistics import Statistics
from tests.pruning.sample import activations, budget, component, made_statistics, made_structure, made_weights, tokens
from tests.tiny import tiny_config, tiny_structure, tiny_weights

LAYERS = 5
NEEDS = frozenset({"moments", "covariance", "cosine", "gradient"})
NEW = (
    "log_increase",
    "linear",
    "cosine_softmax",
    "cosine_linear",
    "cosine_sigmoid",
    "owl",
    "alpha_tail",
    "attention_mlp_power",
)


@functools.cache
def tiny(attention="kv_group"):
    """Dense model of five layers that differ, its statistics and a context; shared, so not to be changed."""
    config = tiny_config("llama", num_hidden_layers=LAYERS)
    structure, units = tiny_structure(config, attention)
    weights = tiny_weights(config, torch.float64)
    for layer in range(LAYERS):  # layers that change the stream more or less, with more or fewer outliers
        for name in (f"model.layers.{layer}.self_attn.o_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight"):
            weights[name] = (weights[name] * (0.3 + layer % 3)).sinh()
    model = surgery.cut(config, weights, structure, make_plan(structure, units, {}, {}))
    statistics = calibration.collect(model, structure, tokens(), NEEDS)
    return SimpleNamespace(
        config=config, structure=structure, units=units, weights=weights, model=model, statistics=statistics
    )


def shape(case, name, asked=None, **options):
    context = AllocationContext(
        structure=case.structure,
        budget=asked or budget(),
        scores={},
        statistics=case.statistics,
        weights=case.weights,
    )
    return allocation.shape(context, component("allocation", name, **options))


def by_layer(case, ratios):
    """The one ratio of each layer, which all its groups must have."""
    found = []
    for layer in range(case.structure.layers):
        values = {ratios[g.name] for g in case.structure.groups if g.layer == layer}
        assert len(values) == 1
        found.append(values.pop())
    return found


def made(layers=6, seed=0, cosines=None, **more):
    structure = made_structure(layers, **more)
    statistics = made_statistics(structure, seed)
    if cosines is not None:
        tensors = dict(statistics.tensors)
        for layer, cosine in enumerate(cosines):
            tensors[f"cosine/model.layers.{layer}/mean"] = torch.tensor(cosine, dtype=torch.float64)
        statistics = Statistics(tokens=statistics.tokens, tensors=tensors)
    return SimpleNamespace(structure=structure, statistics=statistics, weights=made_weights(structure, seed))


def goes(case, asked):
    total = sum(g.units * g.unit_cost for g in case.structure.groups)
    return removal(case.structure, asked) / total


@functools.cache
def angles():
    """Cosine of every token between the input and the output of each layer of the tiny model (L × T)."""
    case, ends = tiny(), {}
    layers = case.model.model.layers
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out, i=i: ends.__setitem__(
                i, ((args[0] if args else kwargs["hidden_states"]), out if isinstance(out, torch.Tensor) else out[0])
            ),
            with_kwargs=True,
        )
        for i, layer in enumerate(layers)
    ]
    with torch.no_grad():
        case.model(input_ids=tokens(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cosine_similarity(*ends[i], dim=-1).flatten() for i in range(LAYERS)])


def cosines():
    return [float(c) for c in angles().mean(1)]


def close(found, expected, rel=1e-5):
    assert found == pytest.approx(expected, rel=rel, abs=1e-9)


class TestRamps:
    @pytest.mark.parametrize("ends", [(1.0, 4.0), (0.0, 0.7), (3.0, 1.0)])
    def test_are_their_formulas(self, ends):
        case = made(7)
        r0, rn = ends
        log = by_layer(case, shape(case, "log_increase", r0=r0, rn=rn))
        line = by_layer(case, shape(case, "linear", r0=r0, rn=rn))
        for i in range(7):
            close(log[i], r0 + (rn - r0) * math.log(i + 1) / math.log(7))
            close(line[i], r0 + (rn - r0) * i / 6)

    @pytest.mark.parametrize("name", ["log_increase", "linear"])
    def test_one_layer_has_the_first_ratio(self, name):
        assert set(shape(made(1), name, r0=0.5, rn=2.0).values()) == {0.5}

    @pytest.mark.parametrize("name", ["log_increase", "linear"])
    def test_nothing_to_prune_is_an_error_of_the_budget(self, name):
        case = made(3)
        with pytest.raises(ConfigError, match="groups stay dense"):
            project(case.structure, shape(case, name, r0=0.0, rn=0.0), budget())

    def test_layers_without_groups_keep_their_place(self):
        """The depth is that of the model, also where some layers have no groups."""
        case = made(5)
        groups = tuple(g for g in case.structure.groups if g.layer in {1, 4})
        part = dataclasses.replace(case.structure, groups=groups)
        some = SimpleNamespace(structure=part, statistics=case.statistics, weights={})
        found = shape(some, "linear", r0=0.0, rn=4.0)
        assert found["model.layers.1.mlp"] == 1.0
        assert found["model.layers.4.mlp"] == 4.0


class TestCosineSoftmax:
    @pytest.mark.parametrize("n", [1, 3, 5, 26])
    def test_is_its_formula_over_the_most_similar_layers(self, n):
        case = tiny()
        found = by_layer(case, shape(case, "cosine_softmax", alpha=7.0, n_layers=n))
        c = cosines()
        chosen = sorted(range(LAYERS), key=lambda layer: c[layer], reverse=True)[:n]
        total = sum(math.exp(7.0 * c[layer]) for layer in chosen)
        for layer in range(LAYERS):
            expected = len(chosen) * math.exp(7.0 * c[layer]) / total if layer in chosen else 0.0
            close(found[layer], expected)
        close(sum(found), min(n, LAYERS))

    def test_a_steep_factor_does_not_overflow(self):
        found = by_layer(made(4), shape(made(4, cosines=[0.1, 0.9, 0.5, 0.89]), "cosine_softmax", alpha=1e5))
        assert found == [0.0, 4.0, 0.0, 0.0]

    def test_of_equal_layers_the_first_count(self):
        case = made(4, cosines=[0.9] * 4)
        assert by_layer(case, shape(case, "cosine_softmax", n_layers=2)) == [2 * 0.5, 2 * 0.5, 0.0, 0.0]


class TestCosineLinear:
    def _steps(self, amplitude, total, taken):
        """Ratios after some steps of the published recursion, with importances that stay."""
        c = cosines()
        centred = [-x + sum(c) / LAYERS for x in c]
        scores = [x / max(abs(y) for y in centred) for x in centred]
        ratios = [0.0] * LAYERS
        for _ in range(taken):
            ratios = [min(0.99, max(0.0, r + 1 / total - amplitude * i)) for r, i in zip(ratios, scores, strict=True)]
        return ratios

    @pytest.mark.parametrize(("amplitude", "total"), [(0.02, 50), (0.01, 50), (0.05, 50)])
    @pytest.mark.parametrize("taken", [1, 9])
    def test_is_the_recursion_with_importances_that_stay(self, amplitude, total, taken):
        case = tiny()
        found = by_layer(case, shape(case, "cosine_linear", amplitude=amplitude * total))
        expected = self._steps(amplitude, total, taken)
        close([r / sum(found) for r in found], [r / sum(expected) for r in expected])

    def test_layers_that_are_alike_lose_alike(self):
        case = made(3, cosines=[0.75] * 3)
        assert by_layer(case, shape(case, "cosine_linear")) == [1.0] * 3


class TestCosineSigmoid:
    def _expected(self, distances, a, keep):
        """The released code's arithmetic, written out."""
        middle = sum(distances) / len(distances)
        q = [1 / (1 + math.exp(-a * (d - middle))) for d in distances]
        mean = sum(q) / len(q)
        if max(q) / mean * keep >= 1:
            factor = mean * (1 / keep - 1) / (max(q) - mean) / 1.05
            q = [mean + (x - mean) * factor for x in q]
        return [1 - x / mean * keep for x in q]

    @pytest.mark.parametrize("remove", [0.05, 0.4])
    @pytest.mark.parametrize("a", [0.0, 1.0, 13.1072, 200.0])
    @pytest.mark.parametrize("distance", ["angular", "cosine"])
    def test_is_its_formula(self, remove, a, distance):
        case, asked = tiny(), budget(remove, of="non_embedding")
        found = by_layer(case, shape(case, "cosine_sigmoid", asked, a=a, distance=distance))
        distances = [1 - c if distance == "cosine" else math.acos(c) / math.pi for c in cosines()]
        expected = self._expected(distances, a, 1 - goes(case, asked))
        close(found, expected, rel=1e-4)
        assert min(found) > 0
        close(sum(found) / LAYERS, goes(case, asked), rel=1e-6)

    def test_both_sides_of_the_bound_are_met(self):
        """At a small budget and a steep slope layers would keep more than they have; at the others none does."""
        case, c = tiny(), cosines()
        distances = [math.acos(x) / math.pi for x in c]
        middle = sum(distances) / LAYERS
        most = []
        for a, remove in ((200.0, 0.05), (1.0, 0.4)):
            q = [1 / (1 + math.exp(-a * (d - middle))) for d in distances]
            most.append(max(q) * LAYERS / sum(q) * (1 - goes(case, budget(remove, of="non_embedding"))))
        assert most[0] > 1 > most[1]

    def test_steep_slopes_and_a_cosine_above_one_stay_finite(self):
        case = made(4, cosines=[1.0 + 1e-8, 0.2, 0.9, -0.5])
        for distance in ("angular", "cosine"):
            found = shape(case, "cosine_sigmoid", a=1e6, distance=distance)
            assert all(math.isfinite(r) and r >= 0 for r in found.values())

    def test_a_budget_beyond_all_groups_takes_all(self):
        case = made(3)
        assert set(shape(case, "cosine_sigmoid", budget(0.99)).values()) == {1.0}


class TestOwl:
    def _percent(self, case, layer, m):
        """Outliers of a layer, entry by entry, from recorded activations."""
        entries = []
        for module in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.down_proj"):
            x = activations(case.model, module, tokens())
            w = case.weights[f"{module}.weight"]
            norms = [math.sqrt(sum(float(v) ** 2 for v in x[:, j])) for j in range(x.shape[1])]
            entries += [abs(float(w[i, j])) * norms[j] for i in range(w.shape[0]) for j in range(w.shape[1])]
        mean = sum(entries) / len(entries)
        return 100 * sum(e > m * mean for e in entries) / len(entries)

    @pytest.mark.parametrize("attention", ["kv_group", "head"])
    @pytest.mark.parametrize(("m", "lam", "remove"), [(3.0, 0.08, 0.3), (5.0, 0.05, 0.3), (3.0, 0.3, 0.1)])
    def test_is_its_formula(self, attention, m, lam, remove):
        case, asked = tiny(attention), budget(remove, of="non_embedding")
        found = by_layer(case, shape(case, "owl", asked, m=m, lam=lam))
        d = [self._percent(case, layer, m) for layer in range(LAYERS)]
        assert len(set(d)) > 2
        k = [(x - min(d)) / (max(d) - min(d)) * 2 * lam for x in d]
        keep = [x - sum(k) / LAYERS + 1 - goes(case, asked) for x in k]
        close(found, [min(1.0, max(0.0, 1 - x)) for x in keep])

    def test_ratios_that_stay_inside_meet_the_share_as_they_are(self):
        case, asked = tiny(), budget(0.3, of="non_embedding")
        found = by_layer(case, shape(case, "owl", asked, m=3.0))
        close(sum(found) / LAYERS, goes(case, asked))
        close(max(found) - min(found), 0.16)

    def test_layers_without_outliers_lose_alike(self):
        case = made(3)
        found = set(shape(case, "owl", m=1e6).values())
        assert len(found) == 1


class TestAlphaTail:
    def _exponent(self, weight, tail):
        """Every start of the tail, one by one, from singular values."""
        values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(weight.double()))
        n = len(values)

        def hill(i):
            return 1 + (n - i) / sum(math.log(v / values[i]) for v in values[i:])

        if tail == "median":
            return hill(n // 2)
        low, high = math.log10(values[0]), math.log10(values[-1])
        counts = [0] * 100
        for v in values:
            counts[min(99, int((math.log10(v) - low) / (high - low) * 100))] += 1
        peak = 10 ** (low + (high - low) * counts.index(max(counts)) / 100)
        best = (math.inf, math.nan)
        for i in range(n - 1):
            if values[i] <= 1.5 * peak:
                gap = max(abs(1 - (v / values[i]) ** (1 - hill(i)) - j / (n - i)) for j, v in enumerate(values[i:]))
                best = min(best, (gap, hill(i)))
        return best[1]

    @pytest.mark.parametrize("tail", ["peak", "median"])
    @pytest.mark.parametrize("attention", ["kv_group", "head"])
    def test_is_its_formula_over_all_matrices_of_a_layer(self, tail, attention):
        case = tiny(attention)
        found = by_layer(case, shape(case, "alpha_tail", eps=0.25, tail=tail))
        means = []
        for layer in range(LAYERS):
            parts = ("q", "k", "v", "o")
            names = [f"self_attn.{p}_proj" for p in parts] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
            each = [self._exponent(case.weights[f"model.layers.{layer}.{n}.weight"], tail) for n in names]
            means.append(sum(each) / 7)
        least, most = min(means), max(means)
        close(found, [0.75 + 0.5 * (q - least) / (most - least) for q in means], rel=1e-6)

    @pytest.mark.parametrize("rows", [20, 40, 60])
    @pytest.mark.parametrize("tail", ["peak", "median"])
    @pytest.mark.parametrize("seed", range(5))
    def test_exponents_are_those_of_the_definition(self, rows, tail, seed):
        weight = torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed)).sinh()
        values = alpha_tail.eigenvalues(weight)
        assert len(values) == min(rows, 40)
        close(alpha_tail.exponent(values, tail), self._exponent(weight, tail), rel=1e-6)

    @pytest.mark.parametrize("alpha", [1.7, 2.5, 4.0])
    @pytest.mark.parametrize("tail", ["peak", "median"])
    def test_finds_the_exponent_of_a_power_law(self, alpha, tail):
        quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        values = (1 - quantiles) ** (-1 / (alpha - 1))
        assert alpha_tail.exponent(values, tail) == pytest.approx(alpha, rel=0.03)

    def test_zero_eigenvalues_do_not_count(self):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(30, 6, generator=generator).double() @ torch.randn(6, 20, generator=generator).double()
        assert len(alpha_tail.eigenvalues(weight)) == 6

    @pytest.mark.parametrize("weight", [torch.eye(8), torch.zeros(8, 8), torch.ones(8, 8)])
    def test_a_spectrum_without_a_tail_is_an_error(self, weight):
        case = made(3, heads=8, channels=8)
        weights = {**case.weights, "model.layers.1.mlp.down_proj.weight": weight}
        with pytest.raises(TrialError, match=r"nan .*layers.1.mlp.down_proj.* different singular values"):
            shape(SimpleNamespace(structure=case.structure, statistics=None, weights=weights), "alpha_tail")

    def test_is_computed_once_for_a_tensor_until_it_changes(self, monkeypatch):
        case, seen = made(3), []
        inner = alpha_tail.eigenvalues
        monkeypatch.setattr(alpha_tail, "eigenvalues", lambda w: seen.append(1) or inner(w))
        one = shape(case, "alpha_tail")
        assert len(seen) == 6
        assert shape(case, "alpha_tail") == one
        assert len(seen) == 6
        case.weights["model.layers.1.mlp.down_proj.weight"][0].mul_(100)
        assert shape(case, "alpha_tail") != one
        assert len(seen) == 7

    def test_one_layer_is_pruned(self):
        assert set(shape(made(1), "alpha_tail").values()) == {0.7}


class TestAttentionMlpPower:
    @pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
    @pytest.mark.parametrize("remove", [0.1, 0.4])
    def test_is_its_formula_and_spends_the_share(self, alpha, remove):
        case, asked = tiny(), budget(remove, of="non_embedding")
        found, s = shape(case, "attention_mlp_power", asked, alpha=alpha), goes(case, asked)
        a = sum(g.units * g.unit_cost for g in case.structure.groups if g.kind == "attention")
        m = sum(g.units * g.unit_cost for g in case.structure.groups if g.kind == "mlp")
        attention = s ** (m / a / alpha)
        assert attention * a < s * (a + m)
        for g in case.structure.groups:
            close(found[g.name], attention if g.kind == "attention" else (s * (a + m) - attention * a) / m)
        close(sum(found[g.name] * g.units * g.unit_cost for g in case.structure.groups), s * (a + m))

    def test_attention_never_pays_more_than_all(self):
        case, asked = made(4, head_cost=4000), budget(0.1)
        found = shape(case, "attention_mlp_power", asked, alpha=50.0)
        paid = {"attention": 0.0, "mlp": 0.0}
        for g in case.structure.groups:
            paid[g.kind] += found[g.name] * g.units * g.unit_cost
        close(paid["attention"], removal(case.structure, asked))
        assert 0 < paid["mlp"] < 0.01

    @pytest.mark.parametrize("kind", ["attention", "mlp"])
    def test_one_kind_alone_is_pruned_alike(self, kind):
        case = made(3)
        groups = tuple(g for g in case.structure.groups if g.kind == kind)
        part = dataclasses.replace(case.structure, groups=groups)
        found = shape(SimpleNamespace(structure=part, statistics=None, weights={}), "attention_mlp_power")
        assert set(found.values()) == {1.0}


@st.composite
def cases(draw):
    layers = draw(st.integers(2, 7))
    return made(
        layers,
        draw(st.integers(0, 1000)),
        draw(st.lists(st.floats(-0.2, 1.0), min_size=layers, max_size=layers)),
        channels=draw(st.integers(10, 60)),
        heads=draw(st.integers(3, 5)),
        head_cost=draw(st.integers(30, 2000)),
        partitions=draw(st.integers(1, 2)),
    )


OPTIONS = {
    "log_increase": {"r0": st.floats(0, 5), "rn": st.floats(0.1, 5)},
    "linear": {"r0": st.floats(0, 5), "rn": st.floats(0.1, 5)},
    "cosine_softmax": {"alpha": st.floats(0, 50), "n_layers": st.integers(1, 8)},
    "cosine_linear": {"amplitude": st.floats(0, 3)},
    "cosine_sigmoid": {"a": st.floats(0, 500), "distance": st.sampled_from(["angular", "cosine"])},
    "owl": {"m": st.floats(1, 8), "lam": st.floats(0, 0.4)},
    "alpha_tail": {"eps": st.floats(0.01, 0.99), "tail": st.sampled_from(["peak", "median"])},
    "attention_mlp_power": {"alpha": st.floats(0.2, 6)},
}


def rising(values):
    return all(a <= b + 1e-12 for a, b in pairwise(values))


class TestAnyModel:
    @pytest.mark.parametrize("name", NEW)
    @given(st.data())
    def test_ratios_are_finite_and_project_onto_the_budget(self, name, data):
        case, asked = data.draw(cases()), budget(data.draw(st.floats(0.02, 0.5)), of="non_embedding")
        options = {key: data.draw(drawn) for key, drawn in OPTIONS[name].items()}
        found = shape(case, name, asked, **options)
        assert all(math.isfinite(r) and r >= 0 for r in found.values())
        assert max(found.values()) > 0
        able = [g for g in case.structure.groups if found[g.name] > 0]
        room = sum((g.width - 1) * g.step_cost for g in able)
        need = removal(case.structure, asked)
        if need > room:
            with pytest.raises(ConfigError, match="must be at most"):
                project(case.structure, found, asked)
            return
        widths = project(case.structure, found, asked)
        gone = case.structure.parameters - case.structure.count(widths)
        dearest = max(g.step_cost for g in able)
        assert 0 <= gone - need < dearest

    @pytest.mark.parametrize("name", ["log_increase", "linear"])
    @given(cases(), st.floats(0, 5), st.floats(0, 5))
    def test_ramps_rise_or_fall(self, name, case, r0, rn):
        found = by_layer(case, shape(case, name, r0=r0, rn=rn))
        assert rising(found if r0 <= rn else found[::-1])
        assert found[0] == pytest.approx(r0)
        assert found[-1] == pytest.approx(rn)

    @pytest.mark.parametrize("name", ["cosine_softmax", "cosine_linear", "cosine_sigmoid"])
    @given(st.data())
    def test_the_more_alike_input_and_output_the_more_a_layer_loses(self, name, data):
        case = data.draw(cases())
        options = {key: data.draw(drawn) for key, drawn in OPTIONS[name].items()}
        found = by_layer(case, shape(case, name, **options))
        c = [case.statistics.cosine(f"model.layers.{layer}") for layer in range(len(found))]
        # Of equal cosines the first counts in cosine_softmax, so the last of them comes first here.
        order = sorted(range(len(found)), key=lambda layer: (c[layer], -layer))
        assert rising([found[layer] for layer in order])

    @given(cases(), st.floats(0.5, 3), st.floats(0.5, 3))
    def test_a_larger_power_takes_more_of_attention(self, case, one, two):
        low, high = sorted([one, two])
        pair = [shape(case, "attention_mlp_power", alpha=alpha) for alpha in (low, high)]
        for g in case.structure.groups:
            less, more = (found[g.name] for found in pair)
            assert less <= more + 1e-12 if g.kind == "attention" else less >= more - 1e-12

    @given(cases(), st.floats(0.05, 0.95))
    def test_tails_give_the_whole_range(self, case, eps):
        found = by_layer(case, shape(case, "alpha_tail", eps=eps))
        assert min(found) == pytest.approx(1 - eps)
        assert max(found) == pytest.approx(1 + eps)


RECIPES = ("slimgpt", "adapt_pruner", "owl_wanda", "alpha_pruning_wanda", "alpha_pruning_taylor")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_cut_a_model_to_the_budget(recipe):
    case, asked = tiny(), budget(0.25)
    mapping = load_recipe(recipe, REPOSITORY / "studies" / "any.yaml", "recipes")
    config = TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, **mapping}, recipe)
    scores = importance.score_all(case.structure, case.weights, case.statistics, config.importance, 0)
    biases = compensation.bias_modules(config.compensation, case.structure)
    context = AllocationContext(
        structure=case.structure,
        budget=asked,
        scores=scores,
        statistics=case.statistics,
        weights=case.weights,
        biases=biases,
    )
    ratios = allocation.shape(context, config.allocation)
    assert len(set(by_layer(case, ratios))) > 2
    plan = make_plan(case.structure, config.units, scores, project(case.structure, ratios, asked, biases), biases)
    model = surgery.cut(case.config, case.weights, case.structure, plan)
    compensation.apply(model, case.structure, plan, case.statistics, case.weights, config.compensation)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters <= 0.75 * case.structure.parameters
    with torch.no_grad():
        assert model(input_ids=tokens()).logits.isfinite().all()
