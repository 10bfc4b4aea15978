"""Masks and skipped sublayers equal zeroed weights, are undone, and the losses are those of the model."""

import pytest
import torch

from adasearch import models
from adasearch.errors import DataError, TrialError
from adasearch.pruning import masking, surgery
from adasearch.pruning.masking import SublayerLoss
from tests.pruning.sample import tokens
from tests.tiny import FAMILIES, VOCABULARY, random_plan, tiny_config, tiny_structure, tiny_weights

LAYERS = 4
PATHS = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in ("self_attn", "mlp")]


def _model(family="llama", dtype=torch.float64, **changes):
    config = tiny_config(family, num_hidden_layers=LAYERS, **changes)
    weights = tiny_weights(config, dtype)
    return (
        models.assemble(models.empty_model(config), {k: w.clone() for k, w in weights.items()}).eval(),
        config,
        weights,
    )


def _without(family, skipped, **changes):
    """The model with zeros for the output projections of sublayers, weights and biases."""
    model, _, _ = _model(family, **changes)
    for path in skipped:
        last = model.get_submodule(f"{path}.{'o_proj' if path.endswith('attn') else 'down_proj'}")
        for parameter in last.parameters():
            parameter.data.zero_()
    return model


def _logits(model, batch=None):
    with torch.no_grad():
        return model(input_ids=tokens() if batch is None else batch, use_cache=False).logits


def _loss(model, batch):
    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch, use_cache=False).loss)


def _divergence(model, dense, batch):
    q, p = (_logits(m, batch)[:, :-1].log_softmax(-1) for m in (model, dense))
    return float((p.exp() * (p - q)).sum(-1).mean())


def _state(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return hooks, [m for m in model.modules() if "forward" in vars(m)], _logits(model)


def _same(one, other):
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["kv_group", "head"])
def test_a_masked_model_equals_a_zeroed_one(family, unit):
    model, config, weights = _model(family)
    structure, units = tiny_structure(config, unit)
    widths = {g.name: max(1, g.width - 1 - 3 * g.layer * (g.kind == "mlp")) for g in structure.groups}
    plan = random_plan(structure, units, widths)
    masks = {g.name: torch.isin(torch.arange(g.units), torch.tensor(plan.keep[g.name])) for g in structure.groups}
    before = _state(model)
    with masking.masked(model, structure, masks):
        inside = _logits(model)
    assert (inside - _logits(surgery.zeroed(config, weights, structure, plan))).abs().max() < 1e-10
    assert (inside - before[2]).abs().max() > 1e-3
    assert _same(_state(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_sublayers_equal_zero_projections(family):
    skipped = frozenset({PATHS[0], PATHS[3], PATHS[6], PATHS[7]})
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model, config, _ = _model(family, **changes)
    structure, _ = tiny_structure(config)
    with masking.masked(model, structure, {}, skipped):
        inside = _logits(model)
    assert (inside - _logits(_without(family, skipped, **changes))).abs().max() < 1e-10


def test_masks_and_skips_are_undone_after_an_exception():
    model, config, _ = _model()
    structure, _ = tiny_structure(config)
    before = _state(model)
    group = structure.groups[1]
    with (
        pytest.raises(KeyError),
        masking.masked(model, structure, {group.name: torch.zeros(group.units) > 0}, {PATHS[4]}),
    ):
        raise KeyError
    assert _same(_state(model), before)
    wrong = {structure.groups[0].name: torch.ones(3) > 0, group.name: torch.ones(3) > 0}
    with pytest.raises(AssertionError, match="must have 40 units"), masking.masked(model, structure, wrong):
        pass
    with pytest.raises(AttributeError), masking.masked(model, structure, {}, frozenset({PATHS[0], "model.none.mlp"})):
        pass
    assert _same(_state(model), before)


class TestLoss:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("budget", [None, 1, 24])
    def test_is_that_of_transformers(self, family, budget):
        model, _, _ = _model(family)
        assert masking.loss(model, tokens(), token_budget=budget) == pytest.approx(_loss(model, tokens()), abs=1e-5)

    def test_divergence_is_its_definition(self):
        model, other = _model()[0], _without("llama", PATHS[2:3])
        dense = masking.last_states(model, tokens(), token_budget=24)
        assert dense.shape == (*tokens().shape, 24)
        found = masking.loss(other, tokens(), dense=dense, token_budget=24)
        assert found == pytest.approx(_divergence(other, model, tokens()), abs=1e-8)
        assert masking.loss(model, tokens(), dense=dense) == pytest.approx(0, abs=1e-8)

    def test_logits_in_pieces_make_no_difference(self, monkeypatch):
        model, _, _ = _model()
        whole = masking.loss(model, tokens())
        monkeypatch.setattr(masking, "_CPU_LOGITS", 7 * 4 * VOCABULARY)
        assert masking.loss(model, tokens()) == pytest.approx(whole, abs=1e-10)

    def test_overflow_is_infinite(self):
        model, _, _ = _model()
        model.get_submodule("model.norm").weight.data.fill_(float("nan"))
        assert masking.loss(model, tokens()) == float("inf")

    @pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
    def test_needs_tokens(self, shape):
        model, _, _ = _model()
        for call in (masking.loss, SublayerLoss):
            with pytest.raises(DataError, match="at least 1 sequence of 2 tokens"):
                call(model, torch.zeros(shape, dtype=torch.long))


class TestSublayerLoss:
    SETS = [(), (7,), (5, 7), (4, 5), (4, 5, 7), (0,), (0, 1), (0, 1, 6), (), (2, 3, 4, 5), (2,)]

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("max_bytes", [2**29, 2 * 5 * 12 * 24 * 8, 1])
    @pytest.mark.parametrize("kind", ["cross_entropy", "divergence"])
    def test_equals_the_loss_of_zero_projections_whatever_came_before(self, family, max_bytes, kind):
        model, _, _ = _model(family)
        before = _state(model)
        evaluate = SublayerLoss(model, tokens(), kind=kind, token_budget=24, max_bytes=max_bytes)
        for numbers in self.SETS:
            skipped = frozenset(PATHS[i] for i in numbers)
            other = _without(family, skipped)
            exact = _loss(other, tokens()) if kind == "cross_entropy" else _divergence(other, model, tokens())
            assert evaluate(skipped) == pytest.approx(exact, abs=1e-5 if kind == "cross_entropy" else 1e-8)
        assert _same(_state(model), before)

    def test_runs_only_the_layers_from_the_first_change(self):
        model, _, _ = _model()
        ran = []
        for i in range(LAYERS):
            model.get_submodule(f"model.layers.{i}").register_forward_hook(lambda *_, i=i: ran.append(i))
        evaluate = SublayerLoss(model, tokens())
        seen = []
        for numbers in [(), (6,), (4,), (3,), (3, 6), (3, 4, 5), (3, 4, 5)]:
            ran.clear()
            evaluate(frozenset(PATHS[i] for i in numbers))
            seen.append(list(ran))
        assert seen == [[0, 1, 2, 3], [3], [2, 3], [1, 2, 3], [3], [3], []]

    def test_a_call_that_fails_spoils_nothing(self):
        model, _, _ = _model()
        evaluate = SublayerLoss(model, tokens(), token_budget=12)
        first = evaluate(frozenset())
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError

        handle = model.get_submodule("model.layers.2").register_forward_hook(fail)
        with pytest.raises(RuntimeError):
            evaluate(frozenset(PATHS[:1]))
        handle.remove()
        assert not [m for m in model.modules() if "forward" in vars(m)]
        again = frozenset(PATHS[-1:])
        assert evaluate(again) == pytest.approx(_loss(_without("llama", again), tokens()), abs=1e-5)
        assert evaluate(frozenset()) == first

    def test_refuses_a_broken_model_and_unknown_sublayers(self):
        model, _, _ = _model()
        with pytest.raises(AssertionError, match=r"model\.layers\.9\.mlp"):
            SublayerLoss(model, tokens())(frozenset({"model.layers.9.mlp"}))
        model.get_submodule("model.norm").weight.data.fill_(float("nan"))
        with pytest.raises(TrialError, match="must be finite"):
            SublayerLoss(model, tokens())
