"""What saves memory changes nothing that is learnt: parts of a batch, recomputation, number formats, 8-bit states."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.sections import TrainingRules
from adasearch.streams import Marks
from adasearch.tuning import decoder, eightbit
from adasearch.tuning.decoder import Update
from adasearch.tuning.eightbit import AdamW8bit
from adasearch.tuning.masters import Masters, computing_in
from adasearch.tuning.training import TrainingConfig, next_token_loss
from tests import tiny
from tests.tuning.test_recovery import BATCH, LENGTH, TRAINING, cut_model, stream
from tests.tuning.test_training_rules import train, usual_teacher

RUN = TrainingConfig(tokens=1, length=LENGTH, batch=BATCH, lr=1e-3)


def uneven_marks(count):
    """Return marks under which sequences count by very different numbers of tokens, and one by none."""
    generator = torch.Generator().manual_seed(4)
    counted = torch.rand(count, generator=generator) < torch.linspace(0.1, 1.0, count)
    counted[LENGTH : 2 * LENGTH] = False
    return Marks(segments=torch.arange(count, dtype=torch.int32) // 5, counted=counted)


def saved_bytes(forward, without=()):
    """Return how many bytes a forward holds for its backward, those of some tensors left out."""
    kept, known = {}, {tensor.untyped_storage().data_ptr() for tensor in without}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


class TestPartsOfABatch:
    @pytest.mark.parametrize("micro", [1, 2, 3])
    @pytest.mark.parametrize("marked", [False, True])
    @pytest.mark.parametrize(
        ("name", "told"), [("full", {}), ("distill", {"rank": 0, "hidden": 2.0, "hard": 0.5, "lr": 1e-3})]
    )
    def test_give_the_gradients_of_the_whole(self, name, told, micro, marked, monkeypatch):
        """Gradients as the optimizer sees them, not clipped; 3 of 4 sequences leave a part of one."""
        seen = []
        tokens = stream(2 * BATCH * LENGTH)
        marks = uneven_marks(len(tokens)) if marked else None

        def step(self, rate, stepped=None):
            self.gather()
            seen[-1].append([c.grad.clone() for c in self.copies])
            for copy_ in self.copies:
                copy_.grad = None
            return 0.0

        usual_teacher()  # which is trained once, by steps as they are
        monkeypatch.setattr(Masters, "step", step)
        for size in (None, micro):
            seen.append([])
            model, structure = cut_model()
            report = train(name, model, structure, TrainingRules(micro_batch=size), tokens, marks=marks, **told)
            seen[-1].append([torch.tensor(report.losses)])
        for whole, parts in zip(*seen, strict=True):
            for one, other in zip(whole, parts, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", TRAINING)
    def test_teach_every_recovery_the_same(self, name):
        results = []
        for size in (None, 1):
            model, structure = cut_model()
            results.append((train(name, model, structure, TrainingRules(micro_batch=size)).losses, model))
        assert results[1][0] == pytest.approx(results[0][0], rel=2e-3)

    def test_are_summed_up_in_float32(self):
        """64 gradients of 1 + 2^-6 each: a bfloat16 sum would stop growing by the small part."""
        parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
        masters = Masters([parameter], RUN)
        for _ in range(64):
            parameter.grad = torch.full_like(parameter, 1.015625)
            masters.gather()
        assert masters.copies[0].grad[0, 0].item() == 65.0


class TestRecomputation:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_gives_the_same_gradients(self, family, dropout):
        model, _ = cut_model(family)
        generator = torch.Generator().manual_seed(1)

        def factors(module):
            a = torch.randn(3, module.in_features, generator=generator, requires_grad=True)
            return Update(a, torch.randn(module.out_features, 3, generator=generator, requires_grad=True), 0.1, dropout)

        updates = {m: factors(m) for n, m in model.named_modules() if n.endswith(("_proj",))}
        model.requires_grad_(True)
        ids = stream(64).view(4, 16)
        found = []
        for again in (False, True):
            model.zero_grad()
            for u in updates.values():
                u.a.grad = u.b.grad = None
            torch.manual_seed(7)
            with decoder.recomputing(again):
                loss, _ = next_token_loss(model, ids, updates=updates)
                loss.backward()
            state = torch.get_rng_state()
            grads = [p.grad for p in model.parameters()] + [g for u in updates.values() for g in (u.a.grad, u.b.grad)]
            found.append((loss, state, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_holds_what_lies_between_layers_alone(self):
        model, _ = cut_model(num_hidden_layers=6)
        model.requires_grad_(True)
        held, ids = [], stream(64).view(4, 16)
        for again in (False, True):
            with decoder.recomputing(again):
                held.append(saved_bytes(lambda: decoder.hidden_states(model, ids), model.parameters()))
        assert held[1] < held[0] / 4

    def test_is_over_after_its_block(self):
        with decoder.recomputing():
            assert decoder._RECOMPUTES.get()
        assert not decoder._RECOMPUTES.get()


class TestPrecision:
    @pytest.mark.parametrize("name", TRAINING)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    def test_ends_in_the_models_own(self, name, dtype, precision):
        model, structure = cut_model(dtype=dtype)
        seen = []

        def look(step, steps, updates):
            seen.append({p.dtype for p in model.parameters()})

        report = train(name, model, structure, TrainingRules(precision=precision), look=look, lr=1e-3)
        assert all(kinds == {getattr(torch, precision)} for kinds in seen)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert len(report.losses) == 8
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    def test_half_precision_keeps_float32_weights_in_full(self):
        """What is trained ends as its master says, frozen weights are the very tensors, the loss is nearly the same."""
        whole, structure = cut_model()
        expected = train("full", whole, structure, lr=1e-3)
        model, structure = cut_model()
        found = train("full", model, structure, TrainingRules(precision="bfloat16"), lr=1e-3)
        assert found.losses == pytest.approx(expected.losses, rel=0.02)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert not torch.equal(weight, weight.bfloat16().float())
        model, structure = cut_model()
        before = model.model.embed_tokens.weight.data
        copied = before.clone()
        train("lora", model, structure, TrainingRules(precision="bfloat16"))
        assert model.model.embed_tokens.weight.data_ptr() == before.data_ptr()
        assert torch.equal(model.model.embed_tokens.weight, copied)

    def test_an_error_restores_it(self):
        parameter = torch.nn.Parameter(torch.rand(3, 3))
        model = torch.nn.Linear(3, 3)
        masters = Masters([parameter, model.bias], RUN)
        seen = []

        def broken():
            with computing_in(model, masters, "bfloat16"):
                seen.append({parameter.dtype, model.weight.dtype, model.bias.dtype})
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            broken()
        assert seen == [{torch.bfloat16}]
        assert {parameter.dtype, model.weight.dtype, model.bias.dtype} == {torch.float32}


class TestEightBits:
    @given(st.integers(0, 1000), st.floats(1e-6, 1e3), st.integers(1, 3 * eightbit.BLOCK))
    def test_codes_keep_elements_to_their_step(self, seed, scale, count):
        """(c / n)^2 of the block's scale: an element is off by at most half a code, about sqrt(x) / n of the scale."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, generator=generator) * scale
        blocks = torch.nn.functional.pad(x.abs(), (0, -count % eightbit.BLOCK)).view(-1, eightbit.BLOCK)
        most = blocks.amax(1, keepdim=True).expand_as(blocks).flatten()[:count]
        found = eightbit.unpack_signed(eightbit.pack_signed(x), x.shape)
        limit = ((x.abs() / most).sqrt() / 127 + 0.5 / 127**2) * most
        assert bool(((found - x).abs() <= limit * 1.01).all())
        root = eightbit.unpack_positive(eightbit.pack_positive(x.abs()), x.shape)
        assert bool(((root - x.abs()).abs() <= ((x.abs() / most).sqrt() / 255 + 1 / 255**2) * most * 1.01).all())
        assert bool((root > 0).eq(x != 0).all())

    def test_zeros_stay_and_shapes_too(self):
        for shape in ((3, 5), (256,), (0, 4)):
            zero = torch.zeros(shape)
            assert torch.equal(eightbit.unpack_signed(eightbit.pack_signed(zero), zero.shape), zero)
            assert torch.equal(eightbit.unpack_positive(eightbit.pack_positive(zero), zero.shape), zero)

    def test_states_take_a_quarter(self):
        big, small = torch.rand(300, 500), torch.rand(100)
        optimizer = AdamW8bit([big, small], [0.0, 0.0])
        assert optimizer.state_bytes == pytest.approx(8 * big.numel() / 4 + 8 * small.numel(), rel=0.02)

    def test_small_tensors_move_as_under_adamw(self):
        torch.manual_seed(0)
        mine = torch.rand(30, 20)
        other = torch.nn.Parameter(mine.clone())
        ours = AdamW8bit([mine], [0.1])
        theirs = torch.optim.AdamW([other], betas=(0.9, 0.95), weight_decay=0.1)
        for rate in (1e-2, 3e-3, 1e-3):
            grad = torch.randn(30, 20)
            theirs.param_groups[0]["lr"] = rate
            other.grad = grad.clone()
            theirs.step()
            ours.update(mine, grad, rate)
        torch.testing.assert_close(mine, other.data, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("name", ["full", "lora"])
    def test_the_loss_falls_as_under_adamw(self, name, monkeypatch):
        """All matrices packed, 60 steps: the curves end within a few hundredths of each other, far below the start."""
        monkeypatch.setattr(eightbit, "LEAST", 64)
        curves = {}
        for optimizer in ("adamw", "adamw8bit"):
            model, structure = cut_model()
            report = train(name, model, structure, TrainingRules(optimizer=optimizer), stream(4000),
                           lr=3e-3 if name == "full" else 1e-2, tokens=60 * BATCH * LENGTH)  # fmt: skip
            curves[optimizer] = [sum(report.losses[i : i + 10]) / 10 for i in range(0, 60, 10)]
        plain, packed = curves["adamw"], curves["adamw8bit"]
        assert plain[-1] < 0.7 * plain[0]
        assert packed == pytest.approx(plain, rel=0.05)

    def test_gradients_are_clipped_and_dropped(self):
        parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.bfloat16))
        masters = Masters([parameter], RUN)
        masters.prepare(TrainingRules(optimizer="adamw8bit"))
        parameter.grad = torch.full_like(parameter, 2.0)
        seen = []
        norm = masters.step(1e-3, lambda: seen.append(masters.copies[0].grad.norm().item()))
        assert norm == pytest.approx(2.0 * 12**0.5, rel=1e-3)
        assert seen == [pytest.approx(1.0, rel=1e-3)]
        assert parameter.grad is None
        assert masters.copies[0].grad is None
        assert masters.copies[0][0, 0].item() == pytest.approx(-1e-3, rel=1e-2)

    def test_states_go_on_where_they_were(self):
        torch.manual_seed(1)
        grads = [torch.randn(80, 80) for _ in range(4)]
        whole, part = torch.rand(80, 80), None
        part = whole.clone()
        one, two = AdamW8bit([whole], [0.0]), AdamW8bit([part], [0.0])
        for grad in grads[:2]:
            one.update(whole, grad, 1e-2)
            two.update(part, grad, 1e-2)
        state = copy.deepcopy(two.state_dict())
        again = AdamW8bit([part], [0.0])
        again.load_state_dict(state)
        for grad in grads[2:]:
            one.update(whole, grad, 1e-2)
            again.update(part, grad, 1e-2)
        assert torch.equal(whole, part)
