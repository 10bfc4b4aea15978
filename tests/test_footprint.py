"""What a training takes of memory: the arithmetic against what tensors really take, and what it says of a 7B model."""

import dataclasses
import functools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adasearch import models
from adasearch.footprint import Training, adapter_parameters, footprint, layer_bytes
from adasearch.sections import TrainingRules
from adasearch.tuning import decoder, eightbit
from adasearch.tuning.decoder import Update
from adasearch.tuning.masters import Masters
from adasearch.tuning.training import TrainingConfig
from tests import tiny
from tests.tuning.test_training_memory import saved_bytes

GB = 10**9  # as makers of GPUs count: one of 80 GB has 79.6 GiB or more, 85 * 10^9 bytes
LLAMA_7B = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                       num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False)  # fmt: skip


def model_of(dtype, **changes):
    config = tiny.tiny_config(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
                              head_dim=16, **changes)  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    return model, models.shape_of(config)


class TestArithmetic:
    @pytest.mark.parametrize("rank", [0, 4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_layer_holds_what_the_decoder_saves(self, dtype, rank):
        """Two models that differ by four layers alone, in sequences long enough for fused attention."""
        held = []
        batch, length = 2, 640
        for layers in (2, 6):
            model, shape = model_of(dtype, num_hidden_layers=layers)
            model.requires_grad_(rank == 0)
            linear = [m for n, m in model.named_modules() if n.endswith("_proj")]
            updates = {
                m: Update(
                    torch.rand(rank, m.in_features, dtype=dtype, requires_grad=True),
                    torch.rand(m.out_features, rank, dtype=dtype, requires_grad=True),
                    1.0,
                )
                for m in (linear if rank else [])
            }
            ids = torch.randint(3, 250, (batch, length))
            known = [*model.parameters(), *(factor for u in updates.values() for factor in (u.a, u.b))]
            forward = functools.partial(decoder.hidden_states, model, ids, updates=updates)
            held.append(saved_bytes(forward, known))
        expected = layer_bytes(shape, rank, dtype.itemsize) * batch * length
        assert (held[1] - held[0]) / 4 == pytest.approx(expected, rel=1e-3)

    @pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_masters_and_states_are_those_of_the_optimizer(self, dtype, optimizer, monkeypatch):
        monkeypatch.setattr(eightbit, "LEAST", 1)
        model, shape = model_of(dtype)
        masters = Masters(list(model.parameters()), TrainingConfig(tokens=1, length=8, batch=1, lr=1e-3))
        masters.prepare(TrainingRules(optimizer=optimizer))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        masters.step(1e-3)
        found = footprint(shape, dtype.itemsize, Training(rules=TrainingRules(optimizer=optimizer)))
        assert found.weights == sum(p.nbytes for p in model.parameters())
        own = sum(c.nbytes for c in masters.copies if c.data_ptr() not in {p.data_ptr() for p in model.parameters()})
        assert found.masters == own
        if optimizer == "adamw8bit":
            states = masters.optimizer.state_bytes
        else:
            kept = masters.optimizer.state_dict()["state"].values()
            states = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in kept)
        assert found.states == pytest.approx(states, rel=0.02)

    def test_adapters_count_both_factors(self):
        model, shape = model_of(torch.float32)
        linear = [m for n, m in model.named_modules() if n.endswith("_proj")]
        assert adapter_parameters(shape, 4) == sum(4 * (m.in_features + m.out_features) for m in linear)

    def test_every_saving_saves(self):
        _, shape = model_of(torch.bfloat16)
        plain = Training(batch=8, length=512)

        def total(**changes):
            return footprint(shape, 2, dataclasses.replace(plain, rules=TrainingRules(**changes))).total

        usual = footprint(shape, 2, plain).total
        assert total(recompute=True) < usual
        assert total(micro_batch=1) < usual
        assert total(processes=4) < usual
        assert total(optimizer="adamw8bit") < usual
        assert footprint(shape, 2, dataclasses.replace(plain, rank=8)).total < usual
        assert footprint(shape, 2, dataclasses.replace(plain, taught=True)).total > usual


class TestSevenBillion:
    """Llama-7B in bfloat16, uncut: what is trained after a cut of 20 % is smaller still."""

    shape = models.shape_of(LLAMA_7B)

    def total(self, **kinds):
        rules = TrainingRules(**{k: kinds.pop(k) for k in list(kinds) if k in TrainingRules.__dataclass_fields__})
        return footprint(self.shape, 2, Training(batch=8, length=2048, rules=rules, **kinds)).total / GB

    def test_has_its_parameters(self):
        assert sum(math.prod(s) for s in self.shape.shapes.values()) == 6_738_415_616

    def test_lora_fits_80_gb(self):
        assert self.total(rank=16, micro_batch=1) < 30
        assert self.total(rank=16, recompute=True) < 30
        assert self.total(rank=16, micro_batch=1, taught=True) < 45

    def test_a_full_tune_fits_80_gb_with_8_bit_states(self):
        total = self.total(optimizer="adamw8bit", recompute=True, micro_batch=1)
        assert 67 < total < 80  # 10 bytes of every parameter, and what a sequence of 2048 tokens takes

    def test_a_full_tune_under_adamw_does_not(self):
        assert self.total(recompute=True, micro_batch=1) > 120
