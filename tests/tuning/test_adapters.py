"""Recoveries with low-rank updates: what each promises, and equality with PEFT where it has the same method."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch import checks, models
from adasearch.config import TrialConfig, component, study_from_dict
from adasearch.errors import ConfigError
from adasearch.library import REPOSITORY
from adasearch.registry import RECOVERY
from adasearch.search.space import Space
from adasearch.tuning.decoder import Update
from adasearch.tuning.recovery import RecoveryContext, _adapters, adalora, lora, prune_peft, prunedlora
from adasearch.tuning.training import TrainingConfig, learning_rate, next_token_loss, sequences
from tests import tiny
from tests.tuning.test_recovery import LENGTH, cut_model, options, plain_loss, recover, stream
from tests.tuning.test_training_memory import uneven_marks
from tests.tuning.test_training_rules import train

ADAPTERS = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"scaling": "rslora", "alpha": 8.0}),
    "dora": ("lora", {"dora": True}),
    "by_cut": ("lora", {"ranks": "by_cut", "rank": 3}),
    "adalora": ("adalora", {"rank": 3, "lr": 3e-2}),
    "prunedlora": ("prunedlora", {"rank": 2}),
    "prune_peft": ("prune_peft", {}),
    "hybrid": ("prune_peft", {"metric": "hybrid", "begin": 0.3, "blocks": 2}),
}


@pytest.fixture
def seen(monkeypatch):
    """What the last run trained, under ``adapters``."""
    found = {}
    train = _adapters.train

    def spy(*given):
        found["adapters"] = given[-1]
        return train(*given)

    monkeypatch.setattr(_adapters, "train", spy)
    return found


def linear(model):
    return {n: m for n, m in model.named_modules() if n.endswith("_proj")}


def changed(model, before):
    return {n for n, m in linear(model).items() if not torch.equal(m.weight, before[n])}


def weights(model):
    return {n: m.weight.detach().clone() for n, m in linear(model).items()}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_unmerged_and_the_loss_falls(case, dtype, seen, monkeypatch):
    name, settings = ADAPTERS[case]
    model, structure = cut_model(dtype=dtype)
    ids = stream(64, seed=9).view(4, 16)
    merge = _adapters.merge

    def spy(module, update):
        if "loss" not in seen:
            updates = {m: _as(u, dtype) for m, u in seen["adapters"].updates().items()}
            seen["loss"] = next_token_loss(model, ids, updates=updates)[1].item()
        merge(module, update)

    monkeypatch.setattr(_adapters, "merge", spy)
    before = plain_loss(model, ids).item()
    report = recover(name, model, structure, **{"lr": 1e-2, **settings})
    assert plain_loss(model, ids).item() < before - 0.01
    assert report.losses[-1] < report.losses[0]
    assert plain_loss(model, ids).item() == pytest.approx(seen["loss"], abs=1e-5 if dtype == torch.float32 else 3e-2)


def _as(update, dtype):
    gain = None if update.gain is None else update.gain.to(dtype)
    return update._replace(a=update.a.to(dtype), b=update.b.to(dtype), gain=gain)


def peft_model(model, structure, config, targets=None, **settings):
    import peft

    names = [n for n in linear(model) if n.rpartition(".")[2] in (targets or structure.lora_targets)]
    return peft.get_peft_model(model, getattr(peft, config)(target_modules=names, **settings))


def peft_run(tuned, given, stepped=lambda step: None):
    """Train with PEFT's adapters, autograd and torch's AdamW; the plain way, for float32."""
    run = TrainingConfig.of(given)
    moving = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, ids in enumerate(sequences(stream(), run)):
        outputs = tuned(input_ids=ids, labels=ids)
        outputs.loss.backward()
        losses.append(
            torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
        )
        torch.nn.utils.clip_grad_norm_(moving, run.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(step, run)
        optimizer.step()
        stepped(step + 1)
        optimizer.zero_grad()
    return losses, tuned.merge_and_unload()


def assert_equal(model, merged, mine, losses, falls=0.1):
    assert mine[-1] < mine[0] - falls
    assert mine == pytest.approx(losses, abs=2e-5)
    for name, plain in merged.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], plain, rtol=1e-3, atol=2e-4, msg=name)


def ramp(factor):
    return torch.linspace(-0.1, 0.1, factor.numel()).view_as(factor)


OFFERED = {
    "plain": ({}, {}),
    "rslora": ({"scaling": "rslora"}, {"use_rslora": True}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "dora and rslora": ({"dora": True, "scaling": "rslora"}, {"use_dora": True, "use_rslora": True}),
    "some": ({"targets": ["q", "mlp"]}, {"targets": ("q_proj", "gate_proj", "up_proj", "down_proj")}),
}
ASKED = [(family, "plain") for family in tiny.FAMILIES] + [("llama", case) for case in OFFERED] + [("qwen2", "dora")]


@pytest.mark.parametrize(("family", "case"), dict.fromkeys(ASKED))
def test_lora_is_that_of_peft_and_autograd(family, case, monkeypatch):
    ours, theirs = OFFERED[case]
    model, structure = cut_model(family)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda factor, **_: factor.data.copy_(ramp(factor)))
    report = recover("lora", model, structure, rank=3, alpha=9.0, lr=5e-3, **ours)
    monkeypatch.undo()
    tuned = peft_model(twin, structure, "LoraConfig", r=3, lora_alpha=9.0, **theirs)
    begin(tuned, {"lora_A": ramp})
    losses, merged = peft_run(tuned, options("lora", lr=5e-3))
    assert_equal(model, merged, report.losses, losses)


@torch.no_grad()
def begin(tuned, values):
    for name, parameter in tuned.named_parameters():
        for part, value in values.items():
            if part in name:
                parameter.copy_(value(parameter))


def test_ranks_by_cut_are_the_rank_pattern_of_peft(monkeypatch):
    model, structure = cut_model()
    twin = copy.deepcopy(model)
    ranks = lora.ranks_by_cut(linear(model), lora.cut_shares(model, structure), 3)
    assert len(set(ranks)) > 1
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda factor, **_: factor.data.copy_(ramp(factor)))
    report = recover("lora", model, structure, rank=3, alpha=9.0, lr=5e-3, ranks="by_cut")
    monkeypatch.undo()
    pattern = dict(zip(linear(twin), ranks, strict=True))
    tuned = peft_model(twin, structure, "LoraConfig", r=3, lora_alpha=9.0, rank_pattern=pattern)
    begin(tuned, {"lora_A": ramp})
    losses, merged = peft_run(tuned, options("lora", lr=5e-3))
    assert_equal(model, merged, report.losses, losses)


def noise(factor):
    generator = torch.Generator().manual_seed(sum(factor.shape))
    return 0.1 * torch.randn(factor.shape, generator=generator)


def test_adalora_is_that_of_peft(monkeypatch, seen):
    model, structure = cut_model()
    twin = copy.deepcopy(model)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda factor, **_: factor.copy_(noise(factor)))
    given = options("adalora", rank=3, lr=3e-2, begin=0.125, end=0.75)
    report = RECOVERY.get("adalora").function(model, structure, stream(), given, RecoveryContext())
    monkeypatch.undo()
    settings = {"init_r": 5, "target_r": 3, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8, "lora_alpha": 16}
    settings["task_type"] = "CAUSAL_LM"  # without it PEFT leaves its regulariser out of the loss
    tuned = peft_model(twin, structure, "AdaLoraConfig", **settings, beta1=0.85, beta2=0.85, orth_reg_weight=0.5)
    begin(tuned, {"lora_A": noise, "lora_B": noise})
    losses, merged = peft_run(tuned, given, tuned.base_model.update_and_allocate)
    assert_equal(model, merged, report.losses, losses, falls=0.02)


def test_the_magnitudes_of_dora_change_nothing_at_first():
    model, _ = cut_model(dtype=torch.bfloat16)
    model.requires_grad_(False)
    ids = stream(64).view(4, 16)
    updates = {m: Update(*_adapters.factors(m, 2), 3.0) for m in linear(model).values()}
    dora = lora.Dora(updates)
    assert all(torch.equal(u.gain, torch.ones_like(u.gain)) for u in dora.updates().values())
    assert next_token_loss(model, ids, updates=dora.updates())[1] == next_token_loss(model, ids)[1]


def test_norms_of_rows_are_those_of_the_sum():
    module = torch.nn.Linear(7, 5)
    update = Update(torch.randn(2, 7), torch.randn(5, 2), 1.3)
    squares = module.weight.detach().square().sum(1)
    expected = (module.weight + 1.3 * update.b @ update.a).norm(dim=1)
    torch.testing.assert_close(lora.row_norms(module, squares, update), expected.detach())


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 9))
def test_apportioned_ranks_are_nearest_to_their_weights(parts, more):
    weights, most = zip(*parts, strict=True)
    total = min(len(parts) + more, sum(most))
    found = lora.apportioned(weights, total, most)

    def distance(numbers):  # of n from its quota q = total w / sum w: (n - q)^2 / w, summed
        return sum((n - total * w / sum(weights)) ** 2 / w for n, w in zip(numbers, weights, strict=True))

    every = [n for n in itertools.product(*(range(1, m + 1) for m in most)) if sum(n) == total]
    assert tuple(found) in every
    assert distance(found) == pytest.approx(min(map(distance, every)))


def test_ranks_go_where_more_was_cut_and_keep_their_sum():
    modules = {f"l.{i}.mlp.up_proj": torch.nn.Linear(50, 40) for i in range(4)}
    cut = {"l.0.mlp": 0.0, "l.1.mlp": 0.2, "l.2.mlp": 0.2, "l.3.mlp": 0.4}
    assert lora.ranks_by_cut(modules, cut, 8) == [4, 8, 8, 12]
    assert lora.ranks_by_cut(modules, {}, 8) == [8] * 4
    assert lora.ranks_by_cut(modules, {"l.3.mlp": 0.1}, 20) == [14, 13, 13, 40], "none above its width"


def test_cut_shares_are_those_of_the_plan():
    model, structure = cut_model()
    found = lora.cut_shares(model, structure)
    assert found == pytest.approx({g.name: (1 + g.layer) / g.width for g in structure.groups})


@pytest.mark.parametrize(
    ("targets", "moved"),
    [
        ("attention", {"q", "k", "v", "o"}),
        ("mlp", {"gate", "up", "down"}),
        ("v", {"v"}),
        (["down", "q"], {"down", "q"}),
        (["mlp", "o"], {"gate", "up", "down", "o"}),
    ],
)
@pytest.mark.parametrize("name", ["lora", "adalora", "prunedlora"])
def test_targets_move_exactly_what_they_name(name, targets, moved):
    model, structure = cut_model()
    before = weights(model)
    recover(name, model, structure, targets=targets, rank=2)
    named = {n for n in before if _adapters.short_name(n) in moved}
    found = changed(model, before)
    assert found <= named
    assert name == "adalora" or found == named, "only a shared budget may leave a module without a rank"


def test_lora_scale_is_alpha_over_rank():
    assert lora._scale(options("lora", alpha=6.0), 4) == 1.5
    assert lora._scale(options("lora", alpha=6.0, scaling="rslora"), 4) == 3.0


def rank_of(change):
    return int(torch.linalg.matrix_rank(change.double(), rtol=1e-4))


@pytest.mark.parametrize("every", [1, 2])
def test_adalora_meets_its_budget_at_the_end(seen, every):
    model, structure = cut_model()
    before = weights(model)
    recover("adalora", model, structure, rank=3, lr=3e-2, every=every)
    adapters = seen["adapters"]
    assert adapters.totals == (14 * 5, 14 * 3)
    assert sum(int((t.values != 0).sum()) for t in adapters.triplets.values()) == 14 * 3
    ranks = [rank_of(m.weight - before[n]) for n, m in linear(model).items()]
    assert sum(ranks) == 14 * 3
    assert len(set(ranks)) > 1, "the budget is shared by importance"


def test_the_budget_falls_by_its_formula():
    paced = options("adalora", begin=0.2, end=0.8, every=2)
    found = {step: paced.left(step, 20, (100, 10), 3) for step in range(1, 21)}
    for step, budget in found.items():
        if step in {6, 8, 10, 12, 14}:
            assert budget == int(10 + 90 * (1 - (step - 4) / 12) ** 3)
        else:
            assert budget == (10 if step == 16 else None)
    assert paced.left(1, 1, (9, 3), 3) == 3, "also the shortest run ends at its budget"


def test_sensitivities_and_scores_are_those_of_the_paper():
    steps = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    found = adalora.Sensitivity(torch.zeros(4, 3), (0.85, 0.7))
    mean = spread = torch.zeros(4, 3)
    for weight, grad in steps:
        found.update(weight, grad)
        now = (weight * grad).abs()
        mean = 0.85 * mean + 0.15 * now
        spread = 0.7 * spread + 0.3 * (now - mean).abs()
    torch.testing.assert_close(found.scores, mean * spread)
    left, values, right = torch.rand(4, 2), torch.rand(2), torch.rand(2, 5)
    by_hand = [values[i] + left[:, i].sum() / 4 + right[i].sum() / 5 for i in range(2)]
    torch.testing.assert_close(adalora.triplet_scores(left, values, right), torch.stack(by_hand))


def test_kept_are_the_greatest_over_all():
    masks = adalora.kept([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0, 1.0])], 3)
    assert [m.tolist() for m in masks] == [[True, False], [True, True, False]]
    assert [m.tolist() for m in adalora.kept([torch.ones(2), torch.ones(2)], 3)] == [[True, True], [True, False]]


def brute_change(weight, slope, curvature, gone):
    """Return the change that minimises <slope, d> + tr(d h d^T) / 2 with weight + d = 0 in the columns `gone`."""
    free = [j for j in range(weight.shape[1]) if j not in gone]
    change = torch.zeros_like(weight)
    change[:, gone] = -weight[:, gone]
    pull = slope[:, free] + change[:, gone] @ curvature[gone][:, free]
    change[:, free] = -pull @ torch.linalg.inv(curvature[free][:, free])
    return change


@pytest.mark.parametrize("trust", [math.inf, 0.3, 0.0])
@pytest.mark.parametrize("gone", [[2], [0, 3]])
def test_what_prunedlora_takes_and_changes_is_the_minimum(trust, gone):
    generator = torch.Generator().manual_seed(3)
    weight, grad = (torch.randn(9, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    grad *= 1e-2
    surgeon = prunedlora.Surgeon(weight, grad, 0.1, trust)
    gram = grad.T @ grad
    curvature = gram + 0.1 * gram.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    newton = grad @ torch.linalg.inv(curvature)
    assert surgeon.share == pytest.approx(min(1.0, trust * float(weight.norm() / newton.norm())))
    slope = surgeon.share * grad

    def loss(change):
        return (slope * change).sum() + 0.5 * torch.trace(change @ curvature @ change.T)

    change = brute_change(weight, slope, curvature, gone)
    torch.testing.assert_close(surgeon.without(torch.tensor(gone)), weight + change)
    for j in range(5):
        cost = loss(brute_change(weight, slope, curvature, [j])) - loss(brute_change(weight, slope, curvature, []))
        assert surgeon.scores[j].item() == pytest.approx(cost.item())


def test_a_factor_without_gradient_costs_nothing_and_stays():
    weight = torch.randn(4, 3)
    surgeon = prunedlora.Surgeon(weight, torch.zeros(4, 3), 0.1, 0.1)
    assert surgeon.scores.tolist() == [0.0] * 3
    expected = weight.clone()
    expected[:, 1] = 0
    torch.testing.assert_close(surgeon.without(torch.tensor([1])), expected)


def test_ranks_that_prunedlora_takes_never_come_back(seen):
    model, structure = cut_model()
    before, alive = weights(model), []

    def look(step, steps, updates):
        alive.append([set(u.b.any(0).nonzero().flatten().tolist()) for u in updates.values()])
        assert all(u.scale == 1.0 for u in updates.values())
        for update, now in zip(updates.values(), alive[-1], strict=True):
            assert set(update.a.any(1).nonzero().flatten().tolist()) == now

    recover("prunedlora", model, structure, rank=2, lr=1e-2, begin=0.2, context=RecoveryContext(look=look))
    assert {len(now) for now in alive[0]} == {8}, "each begins at four times its rank"
    for one, two in itertools.pairwise(alive):
        assert all(later <= sooner for sooner, later in zip(one, two, strict=True))
    assert {len(now) for now in alive[-1]} == {2}
    assert {int(left.sum()) for left in seen["adapters"].alive.values()} == {2}
    assert {rank_of(m.weight - before[n]) for n, m in linear(model).items()} == {2}


@pytest.mark.parametrize(("keep", "left"), [(0.5, 7), (0.01, 1), (0.99, 14), (0.3, 4)])
@pytest.mark.parametrize("metric", [*prune_peft.METRICS, "hybrid"])
def test_prune_peft_leaves_adapters_in_their_share_of_modules(keep, left, metric, seen):
    model, structure = cut_model()
    before = weights(model)
    report = recover("prune_peft", model, structure, keep=keep, metric=metric, begin=0.3, blocks=3)
    assert len(seen["adapters"].updates()) == left
    assert len(changed(model, before)) == left
    assert len(report.losses) == 8


def test_metrics_of_adapters_are_those_they_are_called():
    a, b = torch.randn(2, 7), torch.randn(5, 2)
    pair = [(a, torch.randn(2, 7)), (b, torch.randn(5, 2))]
    grads = [grad for _, grad in pair]
    whole = torch.cat([a.flatten(), b.flatten()])
    slopes = torch.cat([grad.flatten() for grad in grads])
    assert prune_peft.magnitude(pair) == pytest.approx((b @ a).square().mean().sqrt().item(), rel=1e-5)
    assert prune_peft.gradient(pair) == pytest.approx(slopes.abs().mean().item(), rel=1e-5)
    assert prune_peft.snip(pair) == pytest.approx((whole * slopes).abs().mean().item(), rel=1e-5)
    nearly = [pair[0], (torch.tensor([[1.0, 0.01], [-1.0, 1.0]]), torch.zeros(2, 2))]
    assert prune_peft.zeros(nearly) == 0.75
    assert prune_peft.places([0.3, 0.1, 0.2, 0.1]) == [0.75, 0.0, 0.5, 0.25]


def test_the_least_important_adapters_go(seen, monkeypatch):
    model, structure = cut_model()
    order = {id(m): i for i, m in enumerate(linear(model).values())}

    def by_order(pair):
        return 100.0 - next(i for m, i in order.items() if pair[0][0].shape == shapes[m])

    shapes = {id(m): (8, m.in_features) for m in linear(model).values()}
    monkeypatch.setitem(prune_peft.METRICS, "snip", by_order)
    recover("prune_peft", model, structure, keep=0.5)
    left = {order[id(m)] for m in seen["adapters"].updates()}
    worth = {i: by_order([(torch.empty(shapes[m]), None)]) for m, i in order.items()}
    gone = set(worth) - left
    assert min(worth[i] for i in left) >= max(worth[i] for i in gone)


def test_each_block_goes_by_the_metric_that_was_most_often_right(seen, monkeypatch):
    model, structure = cut_model()
    modules = list(linear(model).values())
    place = {m.in_features * 1000 + m.out_features: i for i, m in enumerate(modules)}
    halves = set(modules[:7]), set(modules[7:])

    def size(pair):
        (a, _), (b, _) = pair
        return place[a.shape[1] * 1000 + b.shape[0]]

    monkeypatch.setattr(prune_peft, "METRICS", {"first": size, "last": lambda pair: -size(pair)})
    # without an adapter of the first half the loss is less the earlier it is, of the second half the later it is

    def fake(_model, _ids, _updates, module):
        where = modules.index(module)
        return where if module in halves[0] else -where

    monkeypatch.setattr(prune_peft, "_loss_without", fake)
    recover("prune_peft", model, structure, metric="hybrid", blocks=2, begin=0.5, rounds=2, keep=0.6)
    assert seen["adapters"].votes == [{"first": 2, "last": 0}, {"first": 0, "last": 2}]


def test_metrics_vote_on_the_loss_that_is_trained(monkeypatch):
    """With packed documents that is one of their marks."""
    seen, asked = [], prune_peft.next_token_loss

    def loss(model, ids, *, updates, marks):
        seen.append(marks)
        return asked(model, ids, updates=updates, marks=marks)

    monkeypatch.setattr(prune_peft, "next_token_loss", loss)
    model, structure = cut_model()
    text = stream(36 * LENGTH)
    marks = uneven_marks(len(text))
    train("prune_peft", model, structure, text=text, metric="hybrid", blocks=2, begin=0.5, rounds=2, marks=marks)
    assert seen
    rows = {tuple(row) for row in marks.lines(LENGTH).segments.tolist()}
    assert all({tuple(row) for row in found.segments.tolist()} <= rows for found in seen)


BASE = {
    "model": {"name": "none"},
    "budget": {"remove": 0.2},
    "objective": {"search": ["cloze/pydoc"]},
    "report": {"tasks": ["cloze/pydoc"]},
    "recipes": "none",
    "finalize": {"recovery": "none"},
    "space": {"calibration.samples": {"int": [4, 8]}},
}


def checked(**changes):
    trial = {"calibration": {"corpus": "pydoc"}, **changes.pop("trial", {})}
    study = study_from_dict({**BASE, "trial": trial, **changes}, "study.yaml:", REPOSITORY / "studies" / "any.yaml")
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    checks._check_trainings(study, space, models.shape_of(tiny.tiny_config()), "study.yaml:")


WIDE = r"must be at most 24, the smaller side of model.layers.0.self_attn.q_proj, given"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"trial": {"recovery": {"type": "lora", "rank": 25}}}, f"study.yaml: trial.recovery.rank: {WIDE} 25"),
        ({"trial": {"schedule": {"type": "movement", "rank": 25}}}, f"study.yaml: trial.schedule.rank: {WIDE} 25"),
        ({"trial": {"hidden": {"type": "pat", "rank": 25}}}, f"study.yaml: trial.hidden.rank: {WIDE} 25"),
        (
            {
                "space": {
                    "schedule": {"choice": ["one_shot", "lora_prune"]},
                    "schedule.lora_prune.rank": {"int": [4, 64]},
                }
            },
            f"study.yaml: space.schedule.lora_prune.rank: {WIDE} 64",
        ),
        ({"trial": {"recovery": {"type": "adalora", "rank": 99}}}, f"study.yaml: trial.recovery.rank: {WIDE} 99"),
        (
            {"trial": {"recovery": "lora"}, "space": {"recovery.rank": {"int": [4, 64]}}},
            f"study.yaml: space.recovery.rank: {WIDE} 64",
        ),
        (
            {"space": {"recovery": {"choice": ["none", {"type": "prunedlora", "rank": 30}]}}},
            f"study.yaml: space.recovery.rank: {WIDE} 30",
        ),
        (
            {"recipes": {"mine": {"recovery": {"type": "prune_peft", "rank": 40}}}},
            f"study.yaml: recipes.mine.recovery.rank: {WIDE} 40",
        ),
        (
            {"finalize": {"recovery": {"type": "lora", "rank": 41}}},
            f"study.yaml: finalize.recovery.rank: {WIDE} 41",
        ),
        (
            {"trial": {"recovery": {"type": "adalora", "begin": 0.5, "end": 0.5}}},
            "study.yaml: trial.recovery.begin: must be below end, 0.5, given 0.5",
        ),
    ],
)
def test_what_the_model_cannot_have_is_told_before_any_work(changes, error):
    with pytest.raises(ConfigError, match=error):
        checked(**changes)


def test_what_the_model_can_have_passes():
    checked(trial={"recovery": {"type": "lora", "rank": 24}}, finalize={"recovery": {"type": "adalora", "rank": 24}})


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([], r"recovery\.targets: .*must name at least one projection"),
        ("", r"recovery\.targets: .*unknown projection ''"),
        (["q", "dwn"], r"recovery\.targets: .*unknown projection 'dwn'; did you mean 'down'"),
        (["attention", "q"], r"recovery\.targets: .*each projection once, q stands twice"),
        (3, r"recovery\.targets: .*must name at least one projection"),
    ],
)
@pytest.mark.parametrize("name", ["lora", "adalora", "prunedlora", "prune_peft"])
def test_targets_that_name_nothing_are_refused(name, given, error):
    with pytest.raises(ConfigError, match=error):
        component(RECOVERY, {"type": name, "targets": given}, "recovery")


@pytest.mark.parametrize(
    ("name", "key", "given"),
    [
        ("lora", "start", 2.0),
        ("adalora", "ranks", "by_cut"),
        ("prunedlora", "alpha", 16.0),
        ("prune_peft", "dora", True),
        ("adalora", "start", 0.5),
        ("prunedlora", "damping", 0.0),
        ("prune_peft", "keep", 0.0),
        ("prune_peft", "metric", "best"),
        ("lora", "scaling", "mine"),
    ],
)
def test_fields_of_others_and_values_out_of_range_are_refused(name, key, given):
    with pytest.raises(ConfigError, match=rf"recovery\.{key}: "):
        component(RECOVERY, {"type": name, key: given}, "recovery")


@pytest.mark.parametrize("name", ["lora", "adalora", "prunedlora", "prune_peft"])
def test_an_update_is_of_full_rank_where_the_cut_left_less_than_the_rank(name):
    model, structure = cut_model()
    kept = {}
    narrow = dict(model.named_modules())["model.layers.1.self_attn.k_proj"]
    assert min(narrow.weight.shape) == 8
    recover(name, model, structure, rank=9, context=RecoveryContext(keep=kept.update))
    assert kept
    assert all(u.b.shape[1] <= min(m.weight.shape) for m, u in kept.items())
    assert not any(p.requires_grad for p in model.parameters())


def test_all_of_it_can_be_searched():
    lines = {
        "recovery": {"choice": ["lora", "adalora", "prunedlora", "prune_peft"]},
        "recovery.rank": {"int": [2, 16], "log": True},
        "recovery.targets": {"choice": ["all", ["v", "q"], "down"]},
        "recovery.lora.scaling": {"choice": ["standard", "rslora"]},
        "recovery.lora.dora": {"choice": [False, True]},
        "recovery.lora.ranks": {"choice": ["uniform", "by_cut"]},
        "recovery.start": {"float": [1.0, 4.0]},
        "recovery.prune_peft.keep": {"float": [0.2, 0.8]},
        "recovery.prune_peft.metric": {"choice": ["snip", "hybrid"]},
    }
    study = study_from_dict(
        {**BASE, "trial": {"calibration": {"corpus": "pydoc"}}, "space": lines},
        "study.yaml:",
        REPOSITORY / "studies" / "any.yaml",
    )
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    recovery = {"type": "lora", "rank": 4, "targets": ["v", "q"], "dora": True, "ranks": "by_cut"}
    params = space.encode({**study.trial, "recovery": recovery})
    found = space.decode(params)
    assert found.recovery.options.targets == ("v", "q")
    assert (found.recovery.options.dora, found.recovery.options.ranks) == (True, "by_cut")
    assert TrialConfig.from_dict(found.to_dict(), "") == found
    assert {path for path, _ in space.corners()} == set(lines)
