"""Schedules that learn by training: their formulas, their masks and gates, and the model that they end in."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adasearch import models
from adasearch.config import component
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning import masking, schedule
from adasearch.pruning.learning import RampOptions
from adasearch.pruning.schedule import gates as ddp
from adasearch.pruning.schedule import lora_prune, movement
from adasearch.pruning.schedule._learning import Ramped, changed, masks
from adasearch.registry import SCHEDULE
from adasearch.tuning import decoder, learning
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.training import Lesson, next_token_loss
from tests.pruning.sample import QUICK, sample, schedule_context

RAMPED = ("lora_prune", "movement")
LEARNING = ("gates", *RAMPED)
F32 = torch.float32


def factors(structure, make):
    """A factor for every unit by group, and what the decoder wants of it by module name."""
    units = {g.name: make(g.units) for g in structure.groups}
    wide = {g.output: units[g.name].repeat_interleave(g.output_block) for g in structure.groups}
    return units, wide


def gated(model, factors):
    """What the decoder takes for factors of what modules read, by name."""
    modules = {model.get_submodule(name): factor for name, factor in factors.items()}
    return {module: decoder.unchanged(module)._replace(gate=factor) for module, factor in modules.items()}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dense_with(case, weights):
    return models.assemble(models.empty_model(case.config), {**case.weights, **weights})


class TestGatesInTheDecoder:
    @pytest.mark.parametrize("attention", ["kv_group", "head"])
    def test_masks_are_those_of_masking(self, attention):
        case = sample(attention, F32)
        generator = torch.Generator().manual_seed(1)
        units, wide = factors(case.structure, lambda n: (torch.rand(n, generator=generator) < 0.6).float())
        given = gated(case.model, wide)
        with masking.masked(case.model, case.structure, {n: u.bool() for n, u in units.items()}), torch.no_grad():
            expected = case.model.model(input_ids=case.tokens).last_hidden_state
        found = decoder.hidden_states(case.model, case.tokens, updates=given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("family", ["llama", "qwen3"])
    def test_values_and_gradients_are_those_of_folded_weights(self, family):
        case = sample(family=family, dtype=F32)
        generator = torch.Generator().manual_seed(2)
        _, wide = factors(case.structure, lambda n: torch.randn(n, generator=generator))
        given = {name: factor.clone().requires_grad_() for name, factor in wide.items()}
        model = dense_with(case, {}).requires_grad_(requires_grad=False)
        total, _ = next_token_loss(model, case.tokens, updates=gated(model, given))
        total.backward()
        folded = {name: factor.clone().requires_grad_() for name, factor in wide.items()}
        twin = dense_with(case, {})
        weights = {f"{name}.weight": case.weights[f"{name}.weight"] * f for name, f in folded.items()}
        out = torch.func.functional_call(twin, weights, kwargs={"input_ids": case.tokens}).logits
        plain = nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), case.tokens[:, 1:].flatten())
        plain.backward()
        assert total.item() == pytest.approx(plain.item(), rel=1e-5)
        for name in given:
            torch.testing.assert_close(given[name].grad, folded[name].grad, rtol=1e-3, atol=1e-6)

    def test_gradients_of_gates_are_the_differences_of_their_losses(self):
        case, step = sample(), 1e-2  # the loss is of float32
        model = dense_with(case, {}).requires_grad_(requires_grad=False)
        _, wide = factors(case.structure, lambda n: torch.linspace(0.5, 1.2, n, dtype=torch.float64))
        given = {name: factor.clone().requires_grad_() for name, factor in wide.items()}

        def loss(factors):
            lesson = Lesson(case.model, 2.0)
            return next_token_loss(model, case.tokens, updates=gated(model, factors), lesson=lesson)[0]

        loss(given).backward()
        for name, factor in wide.items():
            for place in (0, len(factor) // 2):
                ends = []
                for change in (step, -step):
                    moved = factor.clone()
                    moved[place] += change
                    ends.append(loss({**wide, name: moved}).item())
                assert given[name].grad[place].item() == pytest.approx(
                    (ends[0] - ends[1]) / (2 * step), rel=2e-2, abs=1e-4
                )


class TestRamp:
    def test_follows_the_cubic(self):
        options = RampOptions(begin=0.2, end=0.8)
        assert [options.part(t) for t in (0.0, 0.2, 0.8, 1.0)] == [0.0, 0.0, 1.0, 1.0]
        assert options.part(0.5) == pytest.approx(1 - 0.5**3)
        parts = [options.part(t / 50) for t in range(51)]
        assert parts == sorted(parts)

    @pytest.mark.parametrize("name", RAMPED)
    @pytest.mark.parametrize("changes", [{"begin": 0.5, "end": 0.5}, {"begin": 0.9, "end": 0.2}])
    def test_without_a_length_is_refused(self, name, changes):
        with pytest.raises(ConfigError, match=r"trial\.schedule.* begin must be below end"):
            component(SCHEDULE, {"type": name, **changes}, "trial.schedule")

    @pytest.mark.parametrize(
        ("name", "key", "given"),
        [("gates", "lr", 0), ("gates", "rank", 4), ("gates", "scope", "layer"), ("lora_prune", "rank", 0),
         ("lora_prune", "decay", 1.5), ("movement", "score_lr", 0), ("movement", "length", 4)],
    )  # fmt: skip
    def test_settings_out_of_range_are_refused_with_their_path(self, name, key, given):
        with pytest.raises(ConfigError, match=rf"schedule\.{key}"):
            component(SCHEDULE, {"type": name, key: given}, "schedule")

    def test_masks_grow_with_the_part_and_come_back_with_the_score(self):
        context = schedule_context(sample(), "lora_prune", 0.3)
        options = RampOptions(begin=0.0, end=0.5, every=2)

        class Given(Ramped):
            seen = {g.name: torch.arange(g.units, dtype=F32) for g in context.structure.groups}

            def scores(self):
                return self.seen

            def gates(self, done):
                return self.masks(done)

        learner = Given(context, options)
        gone = []
        for done in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            found = learner.gates(done)
            gone.append(sum(int((1 - m).sum()) for m in found.values()))
        assert gone[0] == 0
        assert 0 < gone[1] <= gone[2] == gone[3]  # chosen anew every other step
        assert gone == sorted(gone)
        plan = learner.plan()
        assert plan == context.plan(learner.seen)
        assert gone[-1] == gone[-2] == sum(g.units - len(plan.keep[g.name]) for g in context.structure.groups)
        learner.seen = {name: -part for name, part in learner.seen.items()}
        for _ in range(2):
            turned = learner.gates(0.9)
        lowest = next(g for g in context.structure.groups if g.name in turned)
        assert turned[lowest.name][0] == 1.0  # it was the first to go


class TestChanged:
    def test_only_weights_of_other_values_count_wherever_they_lie(self):
        case = sample("head", F32)
        second = list(case.weights)[1]
        moved = {name: weight.clone() for name, weight in case.weights.items()}
        moved[second][0] += 1.0
        model = models.assemble(models.empty_model(case.config), moved)
        assert changed(model, moved) == {}
        found = changed(model, case.weights)
        assert list(found) == [second]
        assert torch.equal(found[second], moved[second])
        assert not torch.equal(found[second], case.weights[second])


class TestFormulas:
    def test_retention(self):
        z = torch.linspace(-1, 2, 31, dtype=torch.float64)
        for mu in (0.5, 0.05):
            expected = [
                min(1.0, max(0.0, 1.2 / (1 + math.exp(-(x - mu) * 2.39 / mu)) - 0.1)) if (x - mu) / mu > -200 else 0.0
                for x in z.tolist()
            ]
            assert ddp.retention(z, mu).tolist() == pytest.approx(expected)
            ends = ddp.retention(torch.tensor([0.0, mu, 2 * mu]), mu).tolist()
            assert ends == pytest.approx([0.0, 0.5, 1.0], abs=5e-3)

    def test_penalty_and_multipliers(self):
        options = ddp.GatesOptions(penalty=3.0, ascent=8.0, binary=0.7, soft=0.4, sharp=0.1)
        z = {"a": nn.Parameter(torch.tensor([0.3, 0.9])), "b": nn.Parameter(torch.tensor([0.5]))}
        costs = {"a": 10, "b": 40}
        both = ddp.Constraint(names=("a", "b"), share=0.5, weight=0.75)
        one = ddp.Constraint(names=("a",), share=0.9, weight=0.25)
        learner = ddp.Gates(z, costs, [both, one], options)
        assert {k: v.tolist() for k, v in learner.gates(0.0).items()} == {k: v.tolist() for k, v in z.items()}
        assert learner.penalty() is None
        z["a"].grad, z["b"].grad = torch.tensor([1.0, -2.0]), torch.tensor([0.5])
        learner.graded({})
        learner.gates(0.25)
        mu = 0.4 - 0.3 * (0.25 + math.sin(math.pi / 4) / math.pi)
        assert learner.mu == pytest.approx(mu)

        def s(x):
            return min(1.0, max(0.0, 1.2 / (1 + math.exp(-(x - mu) * 2.39 / mu)) - 0.1))

        gaps = [(10 * s(0.3) + 10 * s(0.9) + 40 * s(0.5)) / 60 - 0.5, (s(0.3) + s(0.9)) / 2 - 0.9]
        unsure = [sum(c * s(x) * (1 - s(x)) for c, x in ((10, 0.3), (10, 0.9), (40, 0.5))) / 60,
                  (s(0.3) * (1 - s(0.3)) + s(0.9) * (1 - s(0.9))) / 2]  # fmt: skip
        plain = [1.5 * gap**2 + 0.7 * u for gap, u in zip(gaps, unsure, strict=True)]
        assert learner.penalty().item() == pytest.approx(3.5 * (0.75 * plain[0] + 0.25 * plain[1]), rel=1e-5)
        learner.graded({})
        assert [c.multiplier for c in (both, one)] == pytest.approx([8 * 0.25 * gap for gap in gaps], rel=1e-5)
        again = [p + 2 * gap * gap for p, gap in zip(plain, gaps, strict=True)]
        assert learner.penalty().item() == pytest.approx(3.5 * (0.75 * again[0] + 0.25 * again[1]), rel=1e-5)

    def test_scores_of_lora_prune(self):
        structure = sample("head", F32).structure
        group = structure.groups[0]
        generator = torch.Generator().manual_seed(3)
        weights, updates, total = {}, {}, [0.0] * group.units
        for piece in group.slices:
            shape = sample("head", F32).weights[piece.parameter].shape
            sizes = (shape, (2, shape[1]), (shape[0], 2), (2, shape[1]), (shape[0], 2))
            weight, a, b, ga, gb = (torch.randn(size, generator=generator) for size in sizes)
            a.grad, b.grad = ga, gb
            weights[piece.parameter] = weight
            updates[piece.parameter.removesuffix(".weight")] = SimpleNamespace(a=a, b=b, scale=1.5)
            lines = []
            for line in range(shape[piece.dim]):
                salience = 0.0
                for other in range(shape[1 - piece.dim]):
                    i, j = (line, other) if piece.dim == 0 else (other, line)
                    g = sum((gb[i, r] * a[r, j] + b[i, r] * ga[r, j] - gb[i, r] * ga[r, j]).item() for r in range(2))
                    w = weight[i, j].item() + 1.5 * sum((b[i, r] * a[r, j]).item() for r in range(2))
                    salience += abs(g * w)
                lines.append(salience)
            norm = math.sqrt(sum(x * x for x in lines))
            for line, salience in enumerate(lines):
                total[line // piece.block] += salience / norm
        assert lora_prune.unit_scores(group, weights, updates).tolist() == pytest.approx(total, rel=1e-4)

    def test_movement_goes_straight_through_the_masks(self):
        context = schedule_context(sample(), {**QUICK["movement"], "begin": 0.0}, 0.3)
        learner = movement._Moving(context, context.trial.schedule.options)
        z = learner.parameters()
        assert all(torch.equal(m, torch.ones_like(m)) for m in learner.gates(0.0).values())
        found = learner.gates(0.95)
        gone = {g.name: g.units - len(context.plan(learner.scores()).keep[g.name]) for g in context.structure.groups}
        assert {n: int((m == 0).sum()) for n, m in found.items()} == gone
        assert all(bool(((m == 0) | (m == 1)).all()) for m in found.values())
        pulls = [torch.randn_like(m) for m in found.values()]
        sum((m * p).sum() for m, p in zip(found.values(), pulls, strict=True)).backward()
        assert all(torch.equal(part.grad, pull) for part, pull in zip(z, pulls, strict=True))


@pytest.mark.parametrize("name", RAMPED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_masked_model_is_the_one_that_is_cut(name, family):
    case = sample("head", F32, family)
    context = schedule_context(case, name, 0.3, compensation="bias")
    decision = schedule.decide(context)
    small = schedule.cut(context, decision)
    dense = dense_with(case, decision.weights)
    torch.testing.assert_close(logits(small, case.tokens), logits(dense, case.tokens), rtol=1e-4, atol=1e-4)
    for group in case.structure.groups:  # nothing goes, so there is nothing to make up for
        bias = small.get_submodule(group.output).bias
        assert bias.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_gates_folded_are_gates_unfolded(dtype):
    case = sample(dtype=dtype)
    context = schedule_context(case, {**QUICK["gates"], "lr": 0.3}, 0.3)
    seen = []

    def train(model, learner):
        context.train(model, learner)
        seen.append(learner)

    decision = schedule.decide(dataclasses.replace(context, train=train))
    ends = {name: z.detach().relu() for name, z in seen[0]._z.items()}
    assert min(float((z - 1).abs().max()) for z in ends.values()) > 0.05
    stays = masks(context, decision.plan)
    given = {}
    for group in case.structure.groups:
        if group.name in ends:
            factor = (ends[group.name] * stays[group.name]).repeat_interleave(group.output_block)
            given[group.output] = factor
    with torch.no_grad():
        expected = decoder.hidden_states(case.model, case.tokens, updates=gated(case.model, given))
        found = decoder.hidden_states(schedule.cut(context, decision), case.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 if dtype == F32 else 0.1)


@pytest.mark.parametrize("rank", [None, 0, 4])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_what_is_merged_is_what_was_trained(rank, dtype, monkeypatch):
    """The loss falls, and is the same with updates and masks, and after they became one with the weights."""
    case = sample(dtype=dtype)
    name = "gates" if rank is None else "movement"
    told = {
        **QUICK[name],
        "tokens": 900,
        "lr": 0.05 if rank is None else 3e-3,
        **({} if rank is None else {"rank": rank}),
    }
    context = schedule_context(case, told, 0.1)
    before = {n: w.clone() for n, w in case.weights.items()}
    reports, unmerged = [], []
    train = learning.train

    def trained(*given):
        reports.append(train(*given))
        if rank:
            riding = given[-1]
            with torch.no_grad():
                unmerged.append(next_token_loss(given[0], case.tokens, updates=riding.updates())[1].item())
        return reports[-1]

    monkeypatch.setattr(learning, "train", trained)
    decision = schedule.decide(context)
    losses = reports[0].losses
    assert sum(losses[-5:]) < sum(losses[:5]) or rank is None  # masks grow meanwhile
    assert all(torch.equal(w, before[n]) for n, w in case.weights.items())
    assert set(decision.weights) <= set(case.weights)
    assert (len(decision.weights) == len(case.weights)) == (rank == 0)
    assert {w.dtype for w in decision.weights.values()} == {dtype}
    if rank:
        small = schedule.cut(context, decision)
        with torch.no_grad():
            merged = next_token_loss(small, case.tokens)[1].item()
        assert merged == pytest.approx(unmerged[0], abs=1e-4 if dtype == F32 else 5e-2)


@pytest.mark.parametrize("name", ["gates", "lora_prune"])
def test_units_that_do_nothing_go_first(name):
    case = sample("none", F32)
    idle = {g.name: tuple(range(1, g.units, 2)) for g in case.structure.groups}
    weights = {n: w.clone() for n, w in case.weights.items()}
    for group in case.structure.groups:
        weights[f"{group.output}.weight"][:, list(idle[group.name])] = 0
    # what the dense model predicts holds the other units where they are
    told = {**QUICK[name], "tokens": 900, "prior": 0.0, "distill": 100.0}
    context = schedule_context(case, told, 0.1, weights=weights)
    teacher = RecoveryContext(teacher=dense_with(case, weights))

    def train(model, learner):
        ids = case.tokens.flatten()
        return learning.learn(model, case.structure, ids, context.trial.schedule.options, learner, teacher)

    decision = schedule.decide(dataclasses.replace(context, train=train))
    gone = {g.name: set(range(g.units)) - set(decision.plan.keep[g.name]) for g in case.structure.groups}
    assert all(4 < len(units) <= 20 for units in gone.values())
    assert all(units <= set(idle[group]) for group, units in gone.items())


@pytest.mark.parametrize("scope", ["group", "joint"])
def test_gates_move_towards_the_budget(scope):
    case = sample(dtype=F32)
    told = {**QUICK["gates"], "tokens": 1800, "scope": scope}
    allocation = {"type": "global_score", "normalise": "none"} if scope == "joint" else "uniform"
    context = schedule_context(case, told, 0.2, allocation=allocation)
    seen = []

    def train(model, learner):
        context.train(model, learner)
        seen.append(learner)

    decision = schedule.decide(dataclasses.replace(context, train=train))
    learner = seen[0]
    learner.gates(1.0)
    learner.penalty()
    gap = sum(c.weight * abs(found) for c, found in zip(learner.constraints, learner._gaps, strict=True))
    assert gap < 0.1  # from 0.2
    if scope == "joint":
        z = {n: part.detach() for n, part in learner._z.items()}
        assert decision.plan == context.plan(z)


def test_learning_asks_for_a_teacher_where_it_distils():
    case = sample(dtype=F32)
    context = schedule_context(case, "gates")

    def alone(model, learner):
        told = context.trial.schedule.options
        return learning.learn(model, case.structure, case.tokens.flatten(), told, learner, RecoveryContext())

    with pytest.raises(TrialError, match="needs the dense model"):
        schedule.decide(dataclasses.replace(context, train=alone))


@pytest.mark.parametrize("name", LEARNING)
def test_a_budget_that_cannot_be_met_is_told_before_training(name):
    def train(*_):
        raise AssertionError("nothing is to be trained")

    context = schedule_context(sample(), name, 0.99)
    with pytest.raises(ConfigError, match="must be at most"):
        schedule.decide(dataclasses.replace(context, train=train))


@pytest.mark.parametrize("name", LEARNING)
def test_the_criterion_counts_as_much_as_the_prior_says(name):
    def plans(prior):
        told = {**QUICK[name], "prior": prior}
        found = [schedule_context(sample(), told, importance=way, seed=3) for way in ("magnitude", "random")]
        return [schedule.decide(context).plan for context in found]

    without, with_ = plans(0.0), plans(1.0)
    assert without[0] == without[1]
    assert with_[0] != with_[1]
