"""Schedules against brute force: really cut prefixes, laws of the published recurrence, what cannot be had."""

import dataclasses

import pytest
import torch
from torch import nn

from adasearch.errors import ConfigError
from adasearch.pruning import allocation, calibration, compensation, importance, schedule, surgery
from adasearch.pruning.allocation import AllocationContext
from adasearch.pruning.compensation import CompensationContext
from adasearch.pruning.plan import make_plan
from adasearch.pruning.projection import project, removal
from adasearch.pruning.schedule import iterative
from adasearch.registry import ALLOCATION, COMPENSATION
from tests.pruning.sample import made_statistics, made_structure, made_weights, sample, schedule_context

SLIMLLM = {
    "importance": {"type": "by_kind", "mlp": {"type": "spare_bottom", "of": "pca_direction", "share": 0.01},
                   "attention": "head_correlation"},
    "compensation": "affine_out",
}  # fmt: skip
SLIMGPT = {"importance": "obs", "compensation": "least_squares", "allocation": {"type": "log_increase", "rn": 4.0}}
METHODS = {
    "wanda_sp": {},
    "bias": {"importance": "flap", "compensation": "bias"},
    "votes": {"importance": {"type": "act_norm", "average": "normalised_tokens"}, "compensation": "none"},
    "slimgpt": SLIMGPT,
    "slimllm": SLIMLLM,
    "centred": {"importance": "obs", "compensation": {"type": "least_squares", "with_bias": True}},
}


def made(context):
    """The decision, and the model that it ends in."""
    decision = schedule.decide(context)
    model = schedule.cut(context, decision)
    return decision, model


def shot(context):
    """Scores and widths of one shot, step by step."""
    trial, structure = context.trial, context.structure
    biases = compensation.bias_modules(trial.compensation, structure)
    scores = importance.score_all(structure, context.weights, context.statistics, trial.importance, trial.seed)
    seen = AllocationContext(structure=structure, budget=context.budget, scores=scores,
                             statistics=context.statistics, weights=context.weights, biases=biases)  # fmt: skip
    return scores, project(structure, allocation.shape(seen, trial.allocation), context.budget, biases), biases


def prefix(context, scores, widths, biases, outputs):
    """A model that is really cut as far as there are scores, with the output projections found so far."""
    held = {name: widths[name] for name in scores}
    plan = make_plan(context.structure, context.trial.units, scores, held, biases)
    model = surgery.cut(context.config, context.weights, context.structure, plan)
    with torch.no_grad():
        for name, tensors in outputs.items():
            for kind, tensor in tensors.items():
                model.get_submodule(name).get_parameter(kind).copy_(tensor)
    return plan, model


def by_hand(context):
    """Sequential pruning that cuts the whole model again for every sublayer: L passes instead of two."""
    trial = context.trial
    _, widths, biases = shot(context)
    needs = importance.needs(trial.importance) | compensation.needs(trial.compensation)
    scores, outputs = {}, {}
    for group in context.structure.groups:
        if widths[group.name] == group.width:
            continue
        part = dataclasses.replace(context.structure, groups=(group,))
        _, model = prefix(context, scores, widths, biases, outputs)
        statistics = calibration.collect(model, part, context.tokens(), needs)
        scores |= importance.score_all(part, context.weights, statistics, trial.importance, trial.seed)
        plan, model = prefix(context, scores, widths, biases, outputs)
        seen = CompensationContext(structure=part, plan=plan, statistics=statistics, weights=context.weights)
        with torch.no_grad():
            COMPENSATION.get(trial.compensation.type).function(model, seen, trial.compensation.options)
        outputs[group.output] = dict(model.get_submodule(group.output).named_parameters())
    return prefix(context, scores, widths, biases, outputs)


def same(found, expected, tolerance):
    for (name, a), (_, b) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


class TestOneShot:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_scores_then_widths_then_the_best_units_then_compensation(self, method):
        context = schedule_context(sample(), "one_shot", **METHODS[method])
        scores, widths, biases = shot(context)
        plan = make_plan(context.structure, context.trial.units, scores, widths, biases)
        model = surgery.cut(context.config, context.weights, context.structure, plan)
        compensation.apply(model, context.structure, plan, context.statistics, context.weights,
                           context.trial.compensation)  # fmt: skip
        decision, found = made(context)
        assert decision.plan == plan
        assert not decision.outputs
        for a, b in zip(found.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


class TestSequential:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
    def test_is_what_really_cut_prefixes_give(self, method, dtype, tolerance):
        context = schedule_context(sample(dtype=dtype, num_hidden_layers=3), "sequential", 0.25, **METHODS[method])
        plan, expected = by_hand(context)
        decision, found = made(context)
        assert decision.plan == plan
        same(found, expected, tolerance)

    @pytest.mark.parametrize(("family", "changes"), [
        ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4}), ("llama", {"mlp_bias": True}),
    ])  # fmt: skip
    @pytest.mark.parametrize("attention", ["kv_group", "head", "none"])
    def test_is_so_in_every_family_and_unit(self, family, changes, attention):
        context = schedule_context(sample(attention, family=family, **changes), "sequential", 0.25, **SLIMGPT)
        plan, expected = by_hand(context)
        decision, found = made(context)
        assert decision.plan == plan
        same(found, expected, 1e-9)

    def test_differs_from_one_shot(self):
        case = sample(num_hidden_layers=3)
        ways = [schedule_context(case, name, 0.3, compensation="least_squares") for name in ("one_shot", "sequential")]
        (one, a), (two, b) = map(made, ways)
        assert one.plan.widths(case.structure) == two.plan.widths(case.structure)
        first = case.structure.groups[0]
        assert one.plan.keep[first.name] == two.plan.keep[first.name]
        last = case.structure.groups[-1].output
        if one.plan == two.plan:
            assert not torch.allclose(a.get_submodule(last).weight, b.get_submodule(last).weight, rtol=1e-3)

    def test_does_not_depend_on_the_batches(self, monkeypatch):
        context = schedule_context(sample(), "sequential", **SLIMLLM)
        whole, expected = made(context)
        monkeypatch.setattr(calibration, "_CPU_TOKENS", 24)
        seen = []
        handle = nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: seen.append(type(module).__name__)
        )
        parts, found = made(context)
        handle.remove()
        assert parts.plan == whole.plan
        same(found, expected, 1e-6)  # Gram matrices are float32
        batches, groups = 3, context.structure.groups  # 5 sequences of 12 tokens, two to a batch
        cut = [g.kind for g in groups if len(parts.plan.keep[g.name]) < g.units]
        assert seen.count("LlamaAttention") == batches * (
            2 + len(cut)
        )  # to go on in 2 layers, and for what is measured
        assert seen.count("LlamaMLP") == batches * (2 + cut.count("mlp"))

    @pytest.mark.parametrize("parts", [{"importance": "taylor"}, {"importance": {"type": "mix", "first": "taylor"}}])
    def test_what_needs_gradients_is_refused_before_any_work(self, parts):
        context = schedule_context(sample(), "one_shot", **parts)
        asked = dataclasses.replace(context.trial, schedule=schedule_context(sample(), "sequential").trial.schedule)

        def tokens():
            raise AssertionError("no tokens may be asked for")

        context = dataclasses.replace(context, trial=asked, statistics=None, tokens=tokens)
        with pytest.raises(ConfigError, match=r"^schedule: sequential must do .* needs (gradient|fisher)"):
            schedule.decide(context)

    def test_needs_of_the_dense_model_are_those_of_the_widths(self):
        trial = schedule_context(sample(), "sequential", compensation="least_squares").trial
        assert "covariance" not in schedule.needs(trial)
        once = schedule_context(sample(), "one_shot", compensation="least_squares").trial
        assert "covariance" in schedule.needs(once)


class TestIterative:
    @pytest.mark.parametrize("name", ALLOCATION.names())
    @pytest.mark.parametrize("remove", [0.08, 0.2])
    def test_one_step_is_one_shot(self, name, remove):
        case = sample(num_hidden_layers=8)
        ratios = {"type": name, "first": 1, "last": 1} if name == "skip_ends" else name
        more = {"allocation": ratios, "compensation": "affine_out", "importance": "taylor"}
        (one, a), (two, b) = (
            made(schedule_context(case, way, remove, **more)) for way in ("one_shot", {"type": "iterative", "steps": 1})
        )
        assert one.plan == two.plan
        same(a, b, 0.0)

    def _steps(self, monkeypatch, context):
        plans = []

        def record(*args):
            plans.append(make_plan(*args))
            return plans[-1]

        monkeypatch.setattr(iterative, "make_plan", record)
        schedule.decide(context)
        return plans

    @pytest.mark.parametrize("importances", ["taylor", "wanda_sp", "anything"])
    @pytest.mark.parametrize("allocated", ["cosine_linear", "global_score", "uniform"])
    def test_what_went_stays_gone_and_the_budget_rises_in_equal_steps(self, monkeypatch, importances, allocated):
        case, steps = sample("head", num_hidden_layers=3), 5
        more = {} if importances == "anything" else {"importance": importances}
        way = {"type": "iterative", "steps": steps}
        context = schedule_context(case, way, 0.3, allocation=allocated, compensation="bias", **more)
        if importances == "anything":  # other scores at every step, those of units that went as good as any
            dice = torch.Generator().manual_seed(0)
            monkeypatch.setattr(
                importance,
                "score_all",
                lambda structure, *_: {g.name: torch.rand(g.units, generator=dice) for g in structure.groups},
            )
        plans = self._steps(monkeypatch, context)
        assert len(plans) == steps
        before = {g.name: set(range(g.units)) for g in case.structure.groups}
        need = removal(case.structure, context.budget, context.biases)
        for step, plan in enumerate(plans, start=1):
            assert all(set(keep) <= before[name] for name, keep in plan.keep.items())
            before = {name: set(keep) for name, keep in plan.keep.items()}
            gone = case.structure.parameters - case.structure.count(plan.widths(case.structure))
            assert need * step / steps <= gone < need * step / steps + max(g.step_cost for g in case.structure.groups)
        assert plans[-1].biases == context.biases
        assert not any(plan.biases for plan in plans[:-1])

    def test_measures_the_model_as_cut_so_far(self, monkeypatch):
        case, seen = sample(num_hidden_layers=3), []
        context = schedule_context(case, {"type": "iterative", "steps": 3}, 0.3, importance="taylor")
        score_all = importance.score_all

        def record(structure, weights, statistics, *rest):
            seen.append(statistics)
            return score_all(structure, weights, statistics, *rest)

        monkeypatch.setattr(importance, "score_all", record)
        plans = self._steps(monkeypatch, context)
        assert seen[0] is context.statistics
        for plan, statistics in zip(plans[:-1], seen[1:], strict=True):
            model = surgery.cut(case.config, case.weights, case.structure, plan)
            for group in case.structure.groups:  # of the units that stay: those of the model that is really cut
                cut = dataclasses.replace(group, units=len(plan.keep[group.name]))
                part = dataclasses.replace(case.structure, groups=(cut,))
                small = calibration.collect(model, part, case.tokens, frozenset({"gradient"}))
                name = f"{group.output}.weight"
                rows = statistics.rows("gradient", name, "elem1").view(group.units, -1)[list(plan.keep[group.name])]
                torch.testing.assert_close(rows.flatten(), small.rows("gradient", name, "elem1"), rtol=1e-5, atol=1e-9)

    def _numbers(self, monkeypatch, told, way, remove, **more):
        """What a schedule decides from where there is no model: statistics by step, weights of output projections."""
        turns = iter(told)
        monkeypatch.setattr(iterative, "_measured", lambda *_: next(turns))
        context = schedule_context(sample(), way, remove, importance="random", **more)
        structure = made_structure(8, channels=500, heads=400, channel_cost=30, head_cost=40)
        weights = made_weights(structure)
        return dataclasses.replace(context, structure=structure, weights=weights, statistics=told[0])

    @pytest.mark.parametrize("name", ALLOCATION.names())
    def test_while_statistics_stay_the_widths_are_those_of_one_shot(self, monkeypatch, name):
        told = [made_statistics(made_structure(8, channels=500, heads=400))] * 7
        one, many = (
            schedule.decide(self._numbers(monkeypatch, told, way, 0.15, allocation=name))
            for way in ("one_shot", {"type": "iterative", "steps": 7})
        )
        wide = made_structure(8, channels=500, heads=400)
        first, second = one.plan.widths(wide), many.plan.widths(wide)
        assert max(abs(first[g] - second[g]) for g in first) <= 2
        assert min(second.values()) < 350

    @pytest.mark.parametrize("changing", [False, True])
    def test_ratios_of_layers_follow_the_law_of_adapt_pruner(self, monkeypatch, changing):
        """s_l(t) = clip(s_l(t - 1) + s / T - A I_l(t), 0, 0.99), by hand, on cosines that change or do not."""
        structure, steps, amplitude = made_structure(8, channels=500, heads=400), 8, 0.7
        told = [made_statistics(structure, seed=t if changing else 0) for t in range(steps)]
        way, ratios = {"type": "iterative", "steps": steps}, {"type": "cosine_linear", "amplitude": amplitude}
        context = self._numbers(monkeypatch, told, way, 0.2, allocation=ratios)
        structure = context.structure
        widths = schedule.decide(context).plan.widths(structure)
        need = removal(structure, context.budget)
        s = need / sum(g.width * g.step_cost for g in structure.groups)
        gone = dict.fromkeys(range(8), 0.0)
        for statistics in told:
            cosines = [statistics.cosine(f"model.layers.{layer}") for layer in range(8)]
            raw = [sum(cosines) / 8 - c for c in cosines]
            largest = max(map(abs, raw))
            for layer in range(8):
                gone[layer] += s / steps - amplitude * s / steps * raw[layer] / largest
                gone[layer] = min(0.99, max(0.0, gone[layer]))
        for group in structure.groups:
            assert abs(group.width - widths[group.name] - gone[group.layer] * group.width) <= 1.5
