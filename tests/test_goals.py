"""Budgets in latency and memory: met by prediction within a step, by made-up tables; and one table that is measured."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasearch import costs, fresh, goals, latencies, models
from adasearch.checks import check_study
from adasearch.config import StudyConfig, TrialConfig, study_from_dict
from adasearch.describe import describe_study
from adasearch.documents import parse, plain
from adasearch.errors import ConfigError, TrialError
from adasearch.latencies import Conditions, Curve, LatencyTable
from adasearch.pruning.projection import project, reachable
from adasearch.pruning.structure import Outline
from adasearch.sections import BudgetConfig, UnitsConfig
from adasearch.trial import Clock, prune, run_trial
from adasearch.workbench import Workbench
from tests.tiny import save_checkpoint, tiny_config, tiny_structure

SAMPLE = {"calibration": {"corpus": "pydoc", "samples": 2, "length": 32}}
TOLD = Conditions(device="cpu", dtype="float32", threads=1, tokens=16)


def made_up(structure, attention=1.0, mlp=3.0, rest=0.5, power=1.0):
    """Table of terms that grow with a power of the width; all numbers are seconds of dense sublayers."""
    curves = {}
    for kind, whole in (("attention", attention), ("mlp", mlp)):
        widths = latencies.grid(next(g.width for g in structure.groups if g.kind == kind))
        curves[kind] = Curve(widths=widths, seconds=tuple(whole * (w / widths[-1]) ** power for w in widths))
    return LatencyTable(curves=curves, rest=rest)


def yard_of(found, target):
    return goals.Yardstick(goal="latency", target=target, share=lambda s, widths, _: found.share(s, widths))


STRUCTURE, UNITS = tiny_structure(tiny_config(num_hidden_layers=4, intermediate_size=40))
RATIOS = st.lists(st.floats(0.05, 1.0), min_size=8, max_size=8)


def resolved(found, target, ratios, **budget):
    asked = BudgetConfig(latency=target, **budget)
    return goals.resolve(STRUCTURE, lambda _: ratios, asked, (), yard_of(found, target))


def share_at(found, ratios, budget):
    return found.share(STRUCTURE, project(STRUCTURE, ratios, budget))


@settings(max_examples=12)
@given(RATIOS, st.floats(0.65, 0.99), st.floats(0.2, 4.0), st.floats(0.5, 1.5))
def test_a_target_is_met_and_a_millionth_less_does_not_meet_it(numbers, target, mlp, power):
    ratios = dict(zip(STRUCTURE.dense_widths(), numbers, strict=True))
    found = made_up(STRUCTURE, mlp=mlp, power=power)
    budget = resolved(found, target, ratios)
    assert budget.goal is None
    assert share_at(found, ratios, budget) <= target
    less = budget.removing(max(0.0, round(budget.fraction - 1e-6, 6)))
    assert share_at(found, ratios, less) > target


@settings(max_examples=12)
@given(RATIOS, st.floats(0.5, 0.95))
def test_a_target_is_missed_by_no_more_than_the_steps_of_rounding(numbers, target):
    ratios = dict(zip(STRUCTURE.dense_widths(), numbers, strict=True))
    found = made_up(STRUCTURE)
    whole = found.seconds(STRUCTURE, {})
    # a KV group is a third of an attention, and rounding trades one group's step for others' of the same price
    assert target - share_at(found, ratios, resolved(found, target, ratios)) <= 2 * (1.0 / 3) / whole


@settings(max_examples=12)
@given(st.lists(st.floats(0.5, 0.99), min_size=2, max_size=2, unique=True).map(sorted))
def test_a_tighter_target_removes_more(targets):
    ratios, found = dict.fromkeys(STRUCTURE.dense_widths(), 1.0), made_up(STRUCTURE)
    tight, loose = (resolved(found, target, ratios).fraction for target in targets)
    assert tight >= loose > 0


def test_the_whole_latency_removes_nothing():
    ratios, found = dict.fromkeys(STRUCTURE.dense_widths(), 1.0), made_up(STRUCTURE)
    budget = resolved(found, 1.0, ratios, multiple_of=4)
    assert budget.fraction == 0.0
    assert budget.multiple_of == 4
    assert project(STRUCTURE, ratios, budget) == STRUCTURE.dense_widths()


def test_what_all_but_one_group_can_pay_is_met():
    ratios = dict.fromkeys(STRUCTURE.dense_widths(), 1.0) | {"model.layers.0.mlp": 0.0}
    found = made_up(STRUCTURE)
    budget = resolved(found, 0.4, ratios)
    assert project(STRUCTURE, ratios, budget)["model.layers.0.mlp"] == 40
    assert share_at(found, ratios, budget) <= 0.4


def test_a_target_out_of_reach_says_what_can_be_met():
    ratios, found = dict.fromkeys(STRUCTURE.dense_widths(), 1.0), made_up(STRUCTURE, rest=9.0)
    with pytest.raises(ConfigError, match=r"budget.latency: must be at least 0\.4\d* here.*given 0.4$") as caught:
        resolved(found, 0.4, ratios)
    least = float(str(caught.value).split("at least ")[1].split()[0])
    assert share_at(found, ratios, resolved(found, least, ratios)) <= least
    with pytest.raises(ConfigError, match=r"budget.latency: must be at least"):
        resolved(found, round(least - 0.002, 3), ratios)


def test_ratios_that_cannot_be_had_are_no_end_of_the_search():
    """An allocator may refuse a budget that is met by others; smaller ones are tried."""
    found, most = made_up(STRUCTURE), reachable(STRUCTURE, BudgetConfig(remove=0.5)) / 3

    def ratios(budget):
        if budget.fraction > most:
            raise ConfigError("allocation.minimum", "must leave more")
        return dict.fromkeys(STRUCTURE.dense_widths(), 1.0)

    asked = BudgetConfig(latency=0.9)
    budget = goals.resolve(STRUCTURE, ratios, asked, (), yard_of(found, 0.9))
    assert share_at(found, ratios(budget), budget) <= 0.9
    with pytest.raises(ConfigError, match=r"must be at least .*allocation.minimum: must leave more"):
        goals.resolve(STRUCTURE, ratios, asked, (), yard_of(found, 0.5))


def test_a_table_is_the_sum_of_what_a_model_has():
    found = made_up(STRUCTURE, attention=2.0, mlp=8.0, rest=1.0)
    assert found.seconds(STRUCTURE, {}) == pytest.approx(1.0 + 4 * 10.0)
    widths = {"model.layers.1.mlp": 20, "model.layers.2.self_attn": 1}
    assert found.seconds(STRUCTURE, widths) == pytest.approx(41.0 - 4.0 - 2.0 * 2 / 3)
    assert found.share(STRUCTURE, widths) == pytest.approx((41.0 - 4.0 - 4 / 3) / 41.0)
    small, _ = tiny_structure(tiny_config(num_hidden_layers=3))
    outline = Outline(gone=("model.layers.0.self_attn", "model.layers.3.self_attn", "model.layers.3.mlp"))
    left = dataclasses.replace(small, outline=outline, origin=STRUCTURE)
    left = dataclasses.replace(left, groups=tuple(g for g in left.groups if g.name != "model.layers.0.self_attn"))
    assert found.seconds(left, {"model.layers.2.mlp": 10}) == pytest.approx(41.0 - 2.0 - 10.0 - 6.0)
    only, _ = tiny_structure(tiny_config(num_hidden_layers=4), attention="none")
    assert found.seconds(only, {}) == pytest.approx(41.0), "a sublayer that cannot be cut is there all the same"


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=9))
def test_rising_is_the_nearest_rising_sequence(values):
    found = latencies.rising(values)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    error = np.square(np.subtract(found, values)).sum()
    # pool adjacent violators, the textbook way
    blocks = []
    for number in values:
        blocks.append([number, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    best = np.repeat([mean for mean, _ in blocks], [n for _, n in blocks])
    assert error == pytest.approx(np.square(best - values).sum(), abs=1e-9)


def test_a_slow_round_counts_like_a_fast_one():
    points = np.array([1.0, 2.0, 5.0])
    times = np.stack([points, 3 * points, points * [1, 1, 9], 0.9 * points, points])
    assert latencies.settled(times) == pytest.approx(points, rel=1e-9)


@pytest.mark.parametrize(("width", "found"), [
    (1, (1,)), (3, (1, 2, 3)), (8, tuple(range(1, 9))), (40, (1, 5, 10, 15, 20, 25, 30, 35, 40)),
])  # fmt: skip
def test_grid(width, found):
    assert latencies.grid(width) == found


@pytest.mark.parametrize(("given", "message"), [
    ({}, "must hold one of remove, latency and memory, holds none"),
    ({"remove": 0.2, "latency": 0.8}, "holds remove and latency"),
    ({"latency": 0.8, "memory": 0.8}, "holds latency and memory"),
    ({"latency": 1.2}, "budget.latency: input should be less than or equal to 1, given 1.2"),
    ({"latency": 0}, "budget.latency: input should be greater than 0"),
])  # fmt: skip
def test_budgets_that_make_no_sense(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        study_of(tmp_path / "none", tmp_path, budget=given)


def study_of(checkpoint, folder, **changes) -> StudyConfig:
    study = {
        "name": "s",
        "model": {"name": str(checkpoint), "dtype": "float32"},
        "space": {"calibration.samples": {"choice": [2, 4]}},
        "budget": {"latency": 0.75},
        "objective": {"search": ["cloze/pydoc"], "items": 4, "select": 4, "latency_tokens": 16},
        "report": {"tasks": ["cloze/pydoc"], "items": 4},
        "trial": SAMPLE,
        "finalize": {"recovery": "full"},
        "recipes": "none",
        "fidelity": {"divergence": 0},
        **changes,
    }
    return study_from_dict(study, "study:", folder / "study.yaml")


def test_budgets_read_back_and_leave_older_studies_alone(tmp_path):
    asked = study_of("none", tmp_path)
    assert asked.to_dict()["budget"] == {"latency": 0.75, "of": "all", "multiple_of": 1, "uniform": False}
    assert parse(BudgetConfig, asked.to_dict()["budget"], "budget") == asked.budget
    assert asked.removes is None
    usual = study_of("none", tmp_path, budget={"remove": 0.2})
    assert usual.to_dict()["budget"] == {"remove": 0.2, "of": "all", "multiple_of": 1, "uniform": False}
    own = TrialConfig.from_dict({**asked.trial, "budget": {"remove": 0.3}}, "trial")
    assert asked.budget_of(own) == BudgetConfig(remove=0.3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("goals") / "tiny", "qwen3", num_hidden_layers=4)


@pytest.fixture
def known(monkeypatch):
    """Tables are made up, and which conditions they were asked for is kept."""
    asked = []

    def answer(_module, arguments):
        asked.append(json.loads((Path(arguments[0]) / "request.json").read_text(encoding="utf-8")))
        return json.loads(json.dumps(plain(made_up(STRUCTURE))))

    monkeypatch.setattr(fresh, "ask", answer)
    return asked


CASES = {
    "one_shot": {},
    "owl": {"allocation": "owl"},
    "threshold": {"allocation": "global_score"},
    "sequential": {"schedule": "sequential"},
    "biases": {"compensation": "bias", "importance": "flap"},
    "depth": {"depth": {"type": "block_influence", "unit": "sublayer", "share": 0.5}},
}


@pytest.mark.parametrize("goal", ["latency", "memory"])
@pytest.mark.parametrize("case", CASES)
def test_trials_meet_the_target(case, goal, checkpoint, known, tmp_path):
    bench = Workbench(study_of(checkpoint, tmp_path, budget={goal: 0.8}), tmp_path / "run", threads=1)
    config = TrialConfig.from_dict({**bench.study.trial, **CASES[case]}, "trial")
    pruned = prune(config, bench, Clock())
    yard = goals.of_bench(config, bench)
    found = goals.notes(yard, pruned.structure, pruned.plan)[f"{goal}_predicted"]
    assert 0.6 < found <= 0.8
    assert len(known) == (goal == "latency"), "the table is asked for once, and then lies on the disk"
    if goal == "memory":
        shape = bench.outlined(pruned.structure.outline).shape
        elements = costs.cache_elements(shape, pruned.structure, pruned.plan.keep)
        own = costs.memory(sum(p.numel() for p in pruned.model.parameters()), elements, 16, 4)
        dense = bench.structure()
        whole = costs.memory(dense.parameters, costs.cache_elements(bench.base.shape, dense, {}), 16, 4)
        assert found == pytest.approx(own / whole)


def test_schedules_of_many_steps_come_near(checkpoint, known, tmp_path):
    bench = Workbench(study_of(checkpoint, tmp_path, budget={"latency": 0.8}), tmp_path / "run", threads=1)
    config = TrialConfig.from_dict({**bench.study.trial, "schedule": {"type": "iterative", "steps": 2}}, "trial")
    pruned = prune(config, bench, Clock())
    found = goals.notes(goals.of_bench(config, bench), pruned.structure, pruned.plan)["latency_predicted"]
    assert found == pytest.approx(0.8, abs=0.1)


def test_a_trial_says_what_its_widths_predict(checkpoint, known, tmp_path):
    bench = Workbench(study_of(checkpoint, tmp_path), tmp_path / "run", threads=1)
    result, _ = run_trial(TrialConfig.from_dict(bench.study.trial, "trial").to_dict(), bench)
    assert 0.6 < result.notes["latency_predicted"] <= 0.75


def test_a_hidden_size_that_is_cut_has_no_table(checkpoint, known, tmp_path):
    bench = Workbench(study_of(checkpoint, tmp_path, budget={"latency": 0.5}), tmp_path / "run", threads=1)
    config = TrialConfig.from_dict({**bench.study.trial, "hidden": {"type": "magnitude", "remove": 0.3}}, "trial")
    with pytest.raises(TrialError, match=r"hidden: must be none under budget.latency"):
        prune(config, bench, Clock())


@pytest.mark.parametrize("goal", ["latency", "memory"])
def test_validate_says_what_equal_ratios_need(goal, checkpoint, known, tmp_path):
    study = study_of(checkpoint, tmp_path, budget={goal: 0.8}, cluster={"workers": 1, "threads": 1})
    checked = check_study(study, "study.yaml:", tmp_path / "run")
    said = "\n".join(describe_study(study, checked))
    assert f"budget: {goal} at most 0.8 of the dense model's, over 16 tokens" in said
    assert f"by equal ratios {checked.target:,} parameters left" in said
    assert checked.budget.goal is None
    assert 0 < checked.budget.fraction < 1
    assert checked.target == round(checked.structure.parameters * (1 - checked.budget.fraction) - 0.5)
    if goal == "latency":
        assert [request["conditions"]["threads"] for request in known] == [1]
        assert len(list((tmp_path / "run" / "cache" / "latency").glob("*.json"))) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"space": {"budget.remove": {"float": [0.1, 0.3]}}}, "budget.latency: must not be given where the space"),
    ({"trial": {**SAMPLE, "hidden": {"type": "magnitude", "remove": 0.1}}}, "trial.hidden: must be none under"),
    ({"budget": {"latency": 0.05}}, "study.yaml: budget.latency: must be at least 0.1"),
    ({"budget": {"memory": 0.05}}, "study.yaml: budget.memory: must be at least 0"),
])  # fmt: skip
def test_validate_refuses(changes, message, checkpoint, known, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check_study(study_of(checkpoint, tmp_path, **changes), "study.yaml:", tmp_path / "run")


@pytest.mark.parametrize("attention", ["kv_group", "head"])
def test_a_table_is_measured(attention):
    torch.set_num_threads(1)
    config = tiny_config("qwen3", hidden_size=64, intermediate_size=512, num_hidden_layers=3)
    found = latencies.measure(config, UnitsConfig(attention=attention), TOLD)
    assert found.curves["attention"].widths == ((1, 2, 3) if attention == "kv_group" else (1, 2))
    assert found.curves["mlp"].widths == latencies.grid(512)
    assert found.rest > 0
    for curve in found.curves.values():
        assert list(curve.seconds) == sorted(curve.seconds)
        assert curve.seconds[0] >= 0
        assert curve.seconds[-1] > 0


def test_stacks_hold_one_kind_of_sublayer_at_a_width():
    config = tiny_config("llama", num_hidden_layers=3)
    stacks = latencies._Stacks(config, UnitsConfig(), TOLD)
    assert stacks.layers == 3
    none, attention, mlp = stacks.model(None), stacks.model("attention", 2), stacks.model("mlp", 7)
    assert not [name for name, _ in none.named_parameters() if ".layers." in name]
    kinds = [
        {name.split(".")[3] for name, _ in model.named_parameters() if ".layers." in name} for model in (attention, mlp)
    ]
    assert kinds == [{"self_attn", "input_layernorm"}, {"mlp", "post_attention_layernorm"}]
    assert attention.model.layers[2].self_attn.k_proj.out_features == 2 * 8
    assert mlp.model.layers[0].mlp.down_proj.in_features == 7
    ids = torch.ones(1, 8, dtype=torch.long)
    assert all(model(input_ids=ids).logits.isfinite().all() for model in (none, attention, mlp))


def test_a_table_comes_from_a_process_of_its_own_once(tmp_path, monkeypatch):
    config = tiny_config("qwen2", num_hidden_layers=1)
    shape = models.shape_of(config)
    found = latencies.table(config, shape, UnitsConfig(), TOLD, tmp_path)
    assert found.seconds(tiny_structure(config)[0], {}) > 0
    monkeypatch.setattr(fresh, "ask", None)
    assert latencies.table(config, shape, UnitsConfig(attention="none"), TOLD, tmp_path) == found
    with pytest.raises(TypeError):
        latencies.table(config, shape, UnitsConfig(), dataclasses.replace(TOLD, tokens=17), tmp_path)
