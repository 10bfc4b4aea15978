"""Statistics of a sample equal their definitions and leave the model as it was."""

import pytest
import torch

from adasearch.errors import DataError, TrialError
from adasearch.pruning import calibration, statistics, surgery
from adasearch.pruning.plan import make_plan
from tests.pruning.sample import NEEDS, activations, sample, sequence_gradients, tokens
from tests.tiny import FAMILIES, VOCABULARY, tiny_config, tiny_structure, tiny_weights


def _fresh(dtype=torch.float32, family="llama"):
    config = tiny_config(family)
    structure, units = tiny_structure(config)
    dense = make_plan(structure, units, {}, {})
    return surgery.cut(config, tiny_weights(config, dtype), structure, dense), structure


class TestCollect:
    def test_features_equal_their_definition(self):
        case = sample()
        for group in case.structure.groups:
            x = activations(case.model, group.output, case.tokens)
            moments = case.statistics.moments(group.output)
            torch.testing.assert_close(moments.mean, x.mean(0))
            torch.testing.assert_close(moments.variance, x.var(0, unbiased=False))
            gram = case.statistics.covariance(group.output).matrix()
            torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        assert case.statistics.tokens == case.tokens.numel()

    def test_gradients_equal_their_definition(self):
        case = sample()
        model, structure = _fresh(torch.float64)
        gradients = sequence_gradients(model, case.tokens)
        for group in structure.groups:
            for part in group.slices:
                w, g = model.get_parameter(part.parameter).detach(), gradients[part.parameter]
                mean, fisher = g.mean(0), g.square().mean(0)
                expected = {
                    ("gradient", "elem1"): (w * mean).abs(),
                    ("gradient", "signed"): w * mean,
                    ("fisher", "elem2"): w * w * fisher,
                    ("fisher", "mix"): (w * mean - w * w * fisher / 2).abs(),
                    ("fisher", "signed"): w * mean,
                }
                for (family, name), item in expected.items():
                    rows = case.statistics.rows(family, part.parameter, name)
                    torch.testing.assert_close(rows, item.sum(1 - part.dim), rtol=1e-4, atol=1e-8)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_inputs_and_votes_equal_their_definition(self, family):
        case = sample(family=family)
        for group in case.structure.groups:
            for name in ("gate_proj", "up_proj") if group.kind == "mlp" else ("q_proj", "k_proj", "v_proj"):
                x = activations(case.model, f"{group.name}.{name}", case.tokens)
                inputs = case.statistics.inputs(group.name)
                torch.testing.assert_close(inputs.second_moment, x.square().mean(0))
            x = activations(case.model, group.output, case.tokens)
            votes = case.statistics.votes(group.output)
            torch.testing.assert_close(votes.token, (x.square() / x.square().sum(1, keepdim=True)).sum(0))
            torch.testing.assert_close(votes.sequence, x.unflatten(0, case.tokens.shape).norm(dim=1).sum(0))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_cosines_equal_their_definition(self, family):
        model, structure = _fresh(torch.float64, family)
        with torch.no_grad():
            states = model(input_ids=tokens(), use_cache=False, output_hidden_states=True).hidden_states
        found = calibration.collect(model, structure, tokens(), frozenset({"cosine"}))
        exact = torch.cosine_similarity(states[0], states[1], dim=-1).mean()
        assert found.cosine("model.layers.0") == pytest.approx(float(exact), abs=1e-6)
        between = []
        norm = model.get_submodule("model.layers.1.post_attention_layernorm")
        handle = norm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
        last = []
        final = model.get_submodule("model.norm").register_forward_pre_hook(lambda _, args: last.append(args[0]))
        with torch.no_grad():
            model(input_ids=tokens(), use_cache=False)
        handle.remove()
        final.remove()
        for place, pair in {"self_attn": (states[1], between[0]), "mlp": (between[0], last[0])}.items():
            exact = torch.cosine_similarity(*pair, dim=-1).mean()
            assert found.cosine(f"model.layers.1.{place}") == pytest.approx(float(exact), abs=1e-6)

    @pytest.mark.parametrize("needs", [NEEDS - {"fisher"}, NEEDS])
    def test_the_batch_split_makes_no_difference(self, needs):
        model, structure = _fresh()
        one, all_ = (calibration.collect(model, structure, tokens(), needs, token_budget=b) for b in (1, 10_000))
        some = calibration.collect(model, structure, tokens(), needs, token_budget=24)
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(all_.tensors[name], tensor, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(some.tensors[name], tensor, rtol=1e-3, atol=1e-6)

    def test_the_head_in_pieces_makes_no_difference(self, monkeypatch):
        model, structure = _fresh()
        whole = calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        monkeypatch.setattr(calibration, "_CPU_LOGITS", 7 * 4 * VOCABULARY)
        pieces = calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        for name, tensor in whole.tensors.items():
            torch.testing.assert_close(pieces.tensors[name], tensor, rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize("length", [12, 300])
    def test_bfloat16_gradients_are_those_of_autograd(self, length):
        model, structure = _fresh(torch.bfloat16)
        batch = tokens(3, length)
        found = calibration.collect(model, structure, batch, frozenset({"gradient", "fisher"}))
        gradients = sequence_gradients(model, batch)
        for group in structure.groups:
            for part in (s for s in group.slices if s.parameter in gradients):
                w, g = model.get_parameter(part.parameter).detach().float(), gradients[part.parameter].float()
                if w.ndim == 2:
                    exact = (w * g.mean(0)).abs().sum(1 - part.dim).double()
                    rows = found.rows("gradient", part.parameter, "elem1")
                    assert (rows - exact).norm() / exact.norm() < 0.03
                    exact = (w.square() * g.square().mean(0)).sum(1 - part.dim).double()
                    rows = found.rows("fisher", part.parameter, "elem2")
                    assert (rows - exact).norm() / exact.norm() < 0.05

    def test_samples_accumulated_apart_merge_to_the_whole(self):
        model, structure = _fresh()
        families = frozenset(statistics.ACCUMULATORS)
        first, rest = (calibration.accumulate(model, structure, t, families) for t in tokens().split([2, 3]))
        merged = statistics.merge(first, rest)
        whole = calibration.accumulate(model, structure, tokens(), families)
        assert merged.tokens == whole.tokens
        for name, tensor in whole.tensors.items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(merged.tensors[name], tensor, rtol=1e-6, atol=1e-6 * scale)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_gives_the_families_asked_for_and_no_other(self, family):
        model, structure = _fresh(family=family)
        for need in NEEDS:
            assert calibration.collect(model, structure, tokens(2), frozenset({need})).families == {need}

    def test_bfloat16_weights_give_wide_statistics(self):
        model, structure = _fresh(torch.bfloat16)
        found = calibration.collect(model, structure, tokens(), NEEDS)
        assert {t.dtype for t in found.tensors.values()} == {torch.float32, torch.float64}
        exact = sample().statistics.moments("model.layers.0.mlp.down_proj").second_moment
        torch.testing.assert_close(
            found.moments("model.layers.0.mlp.down_proj").second_moment, exact, rtol=0.2, atol=0.01
        )

    def test_refuses_an_empty_or_too_short_sample(self):
        model, structure = _fresh()
        for shape in ((0, 12), (3, 1), (12,)):
            with pytest.raises(DataError, match="at least 1 sequence of 2 tokens"):
                calibration.collect(model, structure, torch.zeros(shape, dtype=torch.long), NEEDS)


def _state(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    hooks.append(model.config._attn_implementation)
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, flags, [m.training for m in model.modules()], [p.detach().clone() for p in model.parameters()]


def _same(before, after):
    return before[:3] == after[:3] and all(torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))


class TestLeavesNothingBehind:
    @pytest.mark.parametrize("flag", [True, False])
    def test_after_success(self, flag):
        model, structure = _fresh()
        model.train()
        model.requires_grad_(flag)
        before = _state(model)
        with torch.no_grad():
            calibration.collect(model, structure, tokens(), statistics.FAMILIES)
        assert _same(before, _state(model))

    @pytest.mark.parametrize("needs", [frozenset({"moments"}), NEEDS])
    def test_after_an_error(self, needs):
        model, structure = _fresh()
        model.requires_grad_(False)
        before = _state(model)
        bad = tokens()
        bad[-1, -1] = 10_000
        with pytest.raises((IndexError, RuntimeError)):
            calibration.collect(model, structure, bad, needs)
        assert _same(before, _state(model))

    def test_after_a_loss_that_is_not_finite(self):
        model, structure = _fresh()
        with torch.no_grad():
            model.get_parameter("model.norm.weight").fill_(float("nan"))
        before = _state(model)
        with pytest.raises(TrialError, match="nan while in phase calibrate"):
            calibration.collect(model, structure, tokens(), frozenset({"gradient"}))
        assert before[:3] == _state(model)[:3]

    def test_activations_that_are_not_finite_are_an_error(self):
        model, structure = _fresh()
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight")[3] = float("inf")
        with pytest.raises(TrialError, match="must be finite"):
            calibration.collect(model, structure, tokens(), frozenset({"moments"}))
