"""Ratios by their definitions, and the projection: the budget is met whatever the ratios."""

import dataclasses
import math
import time

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adasearch.config import component as parsed
from adasearch.documents import parse
from adasearch.errors import ConfigError
from adasearch.pruning import allocation
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.projection import project, reachable, removal
from adasearch.registry import ALLOCATION
from tests.pruning.sample import budget, component, made_structure

STRUCTURES = st.builds(
    made_structure,
    st.integers(1, 6),
    channels=st.integers(1, 60),
    heads=st.integers(1, 5),
    channel_cost=st.integers(1, 50),
    head_cost=st.integers(1, 3000),
    partitions=st.integers(1, 3),
    biases=st.sampled_from([0, 7]),
)
RATIO = st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-4, 10.0))


@st.composite
def problems(draw):
    structure = draw(STRUCTURES)
    ratios = {g.name: draw(RATIO) for g in structure.groups}
    asked = budget(
        draw(st.floats(0.01, 0.95)),
        multiple_of=draw(st.sampled_from([1, 1, 2, 8])),
        of=draw(st.sampled_from(["all", "non_embedding"])),
    )
    biases = tuple(draw(st.lists(st.sampled_from([g.output for g in structure.groups]), unique=True)))
    return structure, ratios, asked, biases


def _solved(problem):
    try:
        return project(*problem)
    except ConfigError:
        return None


def _movable(structure, ratios, multiple):
    """Groups that may lose a unit, and the cost of one step of each."""
    found = []
    for g in structure.groups:
        m = multiple if g.kind == "mlp" else 1
        if ratios[g.name] > 0 and g.width > m:
            found.append((g, m * g.step_cost))
    return found


class TestProject:
    @given(problems())
    def test_the_budget_is_met_within_the_cheapest_step(self, problem):
        structure, ratios, asked, biases = problem
        widths = _solved(problem)
        assume(widths is not None)
        base = structure.parameters - (structure.embedding_parameters if asked.of == "non_embedding" else 0)
        target = structure.parameters - asked.remove * base
        count = structure.count(widths, structure.added(biases))
        assert count <= target + 1e-6
        movable = _movable(structure, ratios, asked.multiple_of)
        cheapest = min(cost for _, cost in movable)
        fine = sum((g.width - 1) // (cost // g.step_cost) * cost for g, cost in movable if cost == cheapest)
        if fine >= max(cost for _, cost in movable):  # else even the cheapest steps together cannot fill a dear one
            assert target - count < cheapest + 1e-6

    @given(problems())
    def test_widths_are_allowed(self, problem):
        structure, ratios, asked, _ = problem
        widths = _solved(problem)
        assume(widths is not None)
        for g in structure.groups:
            width = widths[g.name]
            assert 1 <= width <= g.width
            if g.kind == "mlp":
                assert width == g.width or width % asked.multiple_of == 0
            if ratios[g.name] == 0:
                assert width == g.width

    @given(problems())
    def test_nothing_could_be_given_back(self, problem):
        structure, _, asked, biases = problem
        widths = _solved(problem)
        assume(widths is not None)
        spare = -removal(structure, asked, biases) + structure.parameters - structure.count(widths)
        assert spare >= 0
        for g in structure.groups:
            m = asked.multiple_of if g.kind == "mlp" else 1
            if widths[g.name] < g.width:
                wider = min(g.width, widths[g.name] + m)
                assert (wider - widths[g.name]) * g.step_cost > spare

    @given(problems(), st.floats(0.1, 10))
    def test_is_deterministic_and_free_of_scale(self, problem, scale):
        structure, ratios, asked, biases = problem
        widths = _solved(problem)
        assert widths == _solved(problem)
        doubled = {name: ratio * 4.0 for name, ratio in ratios.items()}
        assert _solved((structure, doubled, asked, biases)) == widths

    @given(problems())
    def test_an_unreachable_budget_says_how_far_it_goes(self, problem):
        structure, ratios, asked, biases = problem
        everything = dict.fromkeys(ratios, 1.0)
        greatest = reachable(structure, asked, biases)
        if asked.remove > greatest + 1e-4:
            with pytest.raises(ConfigError, match=r"budget.remove: must be at most") as error:
                project(structure, everything, asked, biases)
            assert f"{greatest:.4f}" in str(error.value)
        else:
            at = asked.remove if asked.remove <= greatest else greatest
            assume(at > 0)
            again = budget(at, multiple_of=asked.multiple_of, of=asked.of)
            assert project(structure, everything, again, biases)

    @given(problems(), st.floats(0.01, 0.95))
    def test_more_removed_is_never_more_kept(self, problem, other):
        """Up to the slack of one cheapest step the count falls; a group moves back by rounding only."""
        structure, ratios, asked, biases = problem
        low, high = sorted([asked.remove, other])
        pair = [_solved((structure, ratios, budget(r, multiple_of=asked.multiple_of), biases)) for r in (low, high)]
        assume(None not in pair)
        cheapest = min(cost for _, cost in _movable(structure, ratios, asked.multiple_of))
        assert structure.count(pair[1]) < structure.count(pair[0]) + cheapest

    @given(st.integers(1, 6), st.integers(5, 60), st.lists(st.floats(0.1, 1), min_size=6, max_size=6), st.data())
    def test_groups_of_one_price_move_one_way_but_for_rounding(self, layers, channels, ratios, data):
        structure = made_structure(layers, channels=channels, heads=1)
        shares = {g.name: ratios[g.layer] * (g.kind == "mlp") for g in structure.groups}
        low, high = sorted(data.draw(st.tuples(st.floats(0.01, 0.5), st.floats(0.01, 0.5))))
        pair = [_solved((structure, shares, budget(r, of="non_embedding"), ())) for r in (low, high)]
        assume(None not in pair)
        for name in shares:
            assert pair[1][name] <= pair[0][name] + 1

    def test_uniform_ratios_give_uniform_fractions(self):
        structure = made_structure(30, channels=1536, heads=30, channel_cost=1728, head_cost=30_000)
        widths = project(structure, {g.name: 1.0 for g in structure.groups}, budget(0.2, of="non_embedding"))
        for g in structure.groups:
            assert abs(widths[g.name] - 0.8 * g.width) <= 1.5 + 0.001 * g.width

    def test_coarse_groups_keep_their_share_spread_over_the_depth(self):
        """Three KV groups cannot lose 20 % each: some layers lose one, and not all at one end."""
        structure = made_structure(30, channels=1536, heads=3, channel_cost=1728, head_cost=294_912)
        widths = project(structure, {g.name: 1.0 for g in structure.groups}, budget(0.2, of="non_embedding"))
        lost = [g.layer for g in structure.groups if g.kind == "attention" and widths[g.name] < g.width]
        assert 17 <= len(lost) <= 19
        assert all(5 <= sum(layer in part for layer in lost) <= 7 for part in (range(10), range(10, 20), range(20, 30)))
        mlp = [widths[g.name] for g in structure.groups if g.kind == "mlp"]
        assert max(mlp) - min(mlp) <= 1

    def test_a_fraction_means_what_was_written(self):
        structure = made_structure(1, channels=10, heads=1, channel_cost=100, head_cost=100)
        size = structure.parameters
        assert removal(structure, budget(0.1)) == math.ceil(size / 10 - 1e-9)
        assert removal(structure, budget(0.7, of="non_embedding")) == math.ceil((size - 1000) * 7 / 10 - 1e-9)

    def test_biases_are_paid_for(self):
        structure = made_structure(4)
        modules = [g.output for g in structure.groups]
        ratios = {g.name: 1.0 for g in structure.groups}
        widths = project(structure, ratios, budget(0.2), modules)
        assert structure.count(widths, structure.added(modules)) <= 0.8 * structure.parameters
        assert structure.count(widths) <= 0.8 * structure.parameters - 8 * 24

    def test_no_group_that_may_move_is_an_error(self):
        structure = made_structure(2)
        with pytest.raises(ConfigError, match=r"at most 0.0000 for this model while 4 of 4 groups stay dense"):
            project(structure, {g.name: 0.0 for g in structure.groups}, budget(0.1))

    def test_extreme_ratios_do_not_overflow(self):
        structure = made_structure(3)
        ratios = {g.name: 1e-300 if g.layer else 1.0 for g in structure.groups}
        widths = project(structure, ratios, budget(0.6))
        assert structure.count(widths) <= 0.4 * structure.parameters
        assert all(widths[g.name] == 1 for g in structure.groups if not g.layer)

    @pytest.mark.parametrize("multiple", [1, 8, 128])
    def test_is_no_matter_of_seconds_for_64_groups(self, multiple):
        structure = made_structure(32, channels=14_336, heads=8, channel_cost=12_288, head_cost=5_242_880)
        ratios = {g.name: 1.0 + 0.01 * g.layer for g in structure.groups}
        seconds = []
        for remove in (0.05, 0.2, 0.5, 0.85):
            start = time.perf_counter()
            project(structure, ratios, budget(remove, multiple_of=multiple))
            seconds.append(time.perf_counter() - start)
        assert sorted(seconds)[len(seconds) // 2] < 2


class TestUniformWidths:
    """``budget.uniform``: all layers of a kind are equally wide, and the budget is met from below."""

    @staticmethod
    def _steps(structure, kind, widths, multiple):
        """Groups of a kind, the widths that they may have, and the one they got."""
        groups = [g for g in structure.groups if g.kind == kind]
        allowed = [
            w for w in range(1, groups[0].width + 1) if kind != "mlp" or w % multiple == 0 or w == groups[0].width
        ]
        return groups, allowed, widths[groups[0].name]

    @given(problems())
    def test_widths_are_equal_and_allowed_and_meet_the_budget(self, problem):
        structure, ratios, asked, _ = problem
        asked = dataclasses.replace(asked, uniform=True)
        widths = _solved((structure, ratios, asked, ()))
        assume(widths is not None)
        spare = structure.parameters - removal(structure, asked) - structure.count(widths)
        assert spare >= 0
        for kind in ("attention", "mlp"):
            groups, allowed, width = self._steps(structure, kind, widths, asked.multiple_of)
            assert {widths[g.name] for g in groups} == {width}
            assert width in allowed
            if not any(ratios[g.name] for g in groups):
                assert width == groups[0].width
            wider = next((w for w in allowed if w > width), None)
            if wider is not None:  # one level up in all layers would be too much
                assert (wider - width) * sum(g.step_cost for g in groups) > spare

    @given(problems())
    def test_the_cheapest_step_fills_up_what_the_dear_one_leaves(self, problem):
        structure, ratios, asked, _ = problem
        asked = dataclasses.replace(asked, uniform=True, multiple_of=1)
        ratios = dict.fromkeys(ratios, 1.0)
        widths = _solved((structure, ratios, asked, ()))
        assume(widths is not None)
        spare = structure.parameters - removal(structure, asked) - structure.count(widths)
        steps = {k: self._steps(structure, k, widths, 1)[0] for k in ("attention", "mlp")}
        prices = {k: sum(g.step_cost for g in groups) for k, groups in steps.items() if groups[0].width > 1}
        cheapest = min(prices, key=prices.get)
        if prices[cheapest] * (steps[cheapest][0].width - 1) >= max(prices.values()):
            assert spare < prices[cheapest]

    @given(problems())
    def test_only_the_mean_ratio_of_a_kind_counts(self, problem):
        structure, ratios, asked, _ = problem
        asked = dataclasses.replace(asked, uniform=True)
        total = {k: sum(ratios[g.name] for g in structure.groups if g.kind == k) for k in ("attention", "mlp")}
        flat = {g.name: total[g.kind] / structure.layers for g in structure.groups}
        first = {g.name: total[g.kind] * (g.layer == 0) for g in structure.groups}
        found = _solved((structure, ratios, asked, ()))
        for other in (flat, first):
            assert _solved((structure, other, asked, ())) == found

    def test_a_width_that_the_stock_class_refuses_is_left_out(self):
        structure = dataclasses.replace(
            made_structure(4, heads=8, head_cost=100), stock_widths={"attention": (1, 2, 4)}
        )
        ratios = {g.name: 1.0 for g in structure.groups}
        for remove in (0.1, 0.2, 0.3, 0.4):
            asked = budget(remove, uniform=True)
            widths = project(structure, ratios, asked)
            assert {widths[g.name] for g in structure.groups if g.kind == "attention"} <= {1, 2, 4, 8}
            assert structure.count(widths) <= (1 - remove) * structure.parameters
        free = project(structure, ratios, budget(0.1))
        assert {free[g.name] for g in structure.groups if g.kind == "attention"} & {6, 7}

    def test_added_biases_and_uneven_models_are_refused(self):
        structure = made_structure(3)
        ratios, asked = {g.name: 1.0 for g in structure.groups}, budget(0.2, uniform=True)
        with pytest.raises(ConfigError, match=r"budget.uniform: .* adds biases"):
            project(structure, ratios, asked, [structure.groups[0].output])
        assert project(made_structure(3, biases=0), ratios, asked, [structure.groups[0].output])
        first, *others = structure.groups
        uneven = dataclasses.replace(structure, groups=(dataclasses.replace(first, units=2), *others))
        with pytest.raises(ConfigError, match=r"budget.uniform: .* attention widths are 2 to 3"):
            project(uneven, ratios, asked)

    def test_an_allocator_may_ask_for_them(self):
        asked = budget(0.2)
        assert allocation.aimed(asked, component("allocation", "uniform")) == asked
        aimed = allocation.aimed(asked, component("allocation", "uniform", equal_widths=True))
        assert aimed == budget(0.2, uniform=True)
        assert allocation.aimed(aimed, component("allocation", "global_score")) == aimed


def _ratios(structure, name, scores=None, asked=None, **options):
    context = AllocationContext(
        structure=structure, budget=asked or budget(), scores=scores or {}, statistics=None, weights={}
    )
    return allocation.shape(context, component("allocation", name, **options))


class TestShapes:
    def test_uniform(self):
        assert set(_ratios(made_structure(5), "uniform").values()) == {1.0}

    def test_skip_ends(self):
        structure = made_structure(8)
        found = _ratios(structure, "skip_ends", first=2, last=1)
        assert {g.layer for g in structure.groups if found[g.name] == 1.0} == {2, 3, 4, 5, 6}
        assert {g.layer for g in structure.groups if found[g.name] == 0.0} == {0, 1, 7}

    def test_skip_ends_must_leave_a_layer(self):
        with pytest.raises(ConfigError, match="must leave some of the 6 layers"):
            _ratios(made_structure(6), "skip_ends")

    def test_layer_profile_is_its_formula(self):
        structure = made_structure(5)
        mlp, attention = (0.4, -0.3), (0.7, 0.2, 0.1)
        found = _ratios(structure, "layer_profile", mlp=mlp, attention=attention)
        logs = {}
        for g in structure.groups:
            at = math.pi * (g.layer + 0.5) / 5
            if g.kind == "mlp":
                logs[g.name] = 0.4 * math.cos(at) - 0.3 * math.cos(2 * at)
            else:
                logs[g.name] = 0.7 + 0.2 * math.cos(at) + 0.1 * math.cos(2 * at)
        top = max(logs.values())
        for name, log in logs.items():
            assert math.isclose(found[name], math.exp(log - top), rel_tol=1e-12)

    @given(st.integers(1, 8))
    def test_a_profile_of_zeros_is_uniform(self, layers):
        structure = made_structure(layers)
        for options in ({}, {"mlp": (0.0, 0.0), "attention": (0.0,)}):
            assert _ratios(structure, "layer_profile", **options) == _ratios(structure, "uniform")

    def test_a_steep_profile_stays_finite(self):
        found = _ratios(made_structure(5), "layer_profile", mlp=(900.0,), attention=(-900.0,))
        assert all(0 <= r <= 1 for r in found.values())

    def test_a_profile_is_read_from_a_list(self):
        made = parsed(ALLOCATION, {"type": "layer_profile", "mlp": [0.1, 0.2]}, "")
        assert made.options.mlp == (0.1, 0.2)
        with pytest.raises(ConfigError, match=r"allocation.mlp.0"):
            parse(ALLOCATION.get("layer_profile").options, {"mlp": ["x"]}, "allocation")


def _made_scores(structure, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator) * (1 + g.layer) + 0.1 for g in structure.groups}


def _threshold(structure, values, need, minimum, kinds):
    """Steps removed per group, by a loop over all steps from the lowest value."""
    steps = []
    for g in structure.groups:
        if g.kind not in kinds:
            continue
        parts = [sorted(float(v) for v in p) for p in values[g.name].view(g.partitions, g.width)]
        free = g.width - max(1, math.ceil(minimum * g.width))
        steps += [(sum(p[k] for p in parts) / g.partitions, g) for k in range(free)]
    removed, counts = 0, {g.name: 0 for g in structure.groups if g.kind in kinds}
    for _, g in sorted(steps, key=lambda step: step[0]):
        if removed >= need:
            break
        removed += g.step_cost
        counts[g.name] += 1
    return counts


class TestGlobalScore:
    def _expected(self, structure, scores, normalise, per_parameter):
        values = {}
        for g in structure.groups:
            s = scores[g.name].double()
            values[g.name] = {
                "none": s,
                "zscore": (s - s.mean()) / s.std(),
                "l2": s / s.norm(),
                "minmax": (s - s.min()) / (s.max() - s.min()),
                "mean": s / s.abs().mean(),
            }[normalise]
        if per_parameter:
            low = min(
                0.0, *(float(values[g.name].view(g.partitions, -1).min(1).values.mean()) for g in structure.groups)
            )
            values = {g.name: (values[g.name] - low) / g.unit_cost for g in structure.groups}
        return values

    @pytest.mark.parametrize("normalise", ["none", "zscore", "l2", "minmax", "mean"])
    @pytest.mark.parametrize("per_parameter", [True, False])
    @pytest.mark.parametrize("scope", ["joint", "type"])
    def test_is_one_threshold_over_sorted_steps(self, normalise, per_parameter, scope):
        structure = made_structure(4, heads=6, partitions=2)
        scores, asked = _made_scores(structure), budget(0.3)
        found = _ratios(
            structure, "global_score", scores, asked, normalise=normalise, per_parameter=per_parameter, scope=scope
        )
        values, need = self._expected(structure, scores, normalise, per_parameter), removal(structure, asked)
        total = sum(g.units * g.unit_cost for g in structure.groups)
        expected = {}
        for kinds in [("attention",), ("mlp",)] if scope == "type" else [("attention", "mlp")]:
            share = sum(g.units * g.unit_cost for g in structure.groups if g.kind in kinds) / total
            expected |= _threshold(structure, values, math.ceil(need * share), 0.1, kinds)
        assert {g.name: round(found[g.name] * g.width) for g in structure.groups} == expected

    @given(st.integers(0, 1000), st.floats(0.05, 0.6), st.sampled_from(["joint", "type"]))
    def test_projection_keeps_what_the_threshold_decided(self, seed, remove, scope):
        structure = made_structure(5, heads=8, channel_cost=30, head_cost=90)
        scores, asked = _made_scores(structure, seed), budget(remove, of="non_embedding")
        found = _ratios(structure, "global_score", scores, asked, normalise="mean", scope=scope)
        widths = project(structure, found, asked)
        for g in structure.groups:
            assert abs(widths[g.name] - g.width * (1 - found[g.name])) <= 2.001

    def test_every_group_keeps_its_minimum(self):
        structure = made_structure(4, channels=40, heads=10)
        scores = {g.name: torch.arange(g.units) + (1000.0 if g.layer else 0.0) for g in structure.groups}
        found = _ratios(structure, "global_score", scores, budget(0.2), normalise="none", minimum=0.25)
        assert found["model.layers.0.mlp"] == pytest.approx(0.75)
        assert found["model.layers.0.self_attn"] == pytest.approx(0.7)

    def test_a_minimum_that_leaves_too_little_is_an_error(self):
        structure = made_structure(3)
        with pytest.raises(ConfigError, match=r"global_score.minimum: must leave .* parameters to remove"):
            _ratios(structure, "global_score", _made_scores(structure), budget(0.6), minimum=0.9)

    def test_equal_scores_are_no_trouble(self):
        structure = made_structure(3)
        scores = {g.name: torch.ones(g.units) for g in structure.groups}
        for normalise in ("none", "zscore", "l2", "minmax", "mean"):
            found = _ratios(structure, "global_score", scores, budget(0.2), normalise=normalise)
            assert all(math.isfinite(r) for r in found.values())

    def test_a_million_units_are_no_matter_of_minutes(self):
        structure = made_structure(64, channels=16_384, heads=64)
        start = time.perf_counter()
        _ratios(structure, "global_score", _made_scores(structure), budget(0.3))
        assert time.perf_counter() - start < 60
