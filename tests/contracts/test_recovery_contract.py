"""What every recovery promises, whatever it does."""

import pytest
import torch

from adasearch.registry import RECOVERY
from adasearch.tuning.recovery import RecoveryContext
from tests.tiny import FAMILIES
from tests.tuning.test_recovery import BATCH, LENGTH, cut_model, options, plain_loss, stream, taught


def run(name, model, structure, seed=5, **changes):
    entry = RECOVERY.get(name)
    if "rank" in entry.options.__dataclass_fields__:
        changes = {"rank": 4, **changes}  # the smaller side of the smallest projection that is left
    given = options(name, **changes)
    teacher = taught(model) if getattr(given, "distill", 0) else None
    return entry.function(model, structure, stream(), given, RecoveryContext(seed=seed, teacher=teacher))


@pytest.mark.parametrize("name", RECOVERY.names())
class TestRecovery:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_shapes_names_and_dtype_stay(self, name, family, dtype):
        model, structure = cut_model(family, dtype)
        before = {k: (v.shape, v.dtype) for k, v in model.state_dict().items()}
        report = run(name, model, structure)
        assert {k: (v.shape, v.dtype) for k, v in model.state_dict().items()} == before
        assert not model.training
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not hasattr(model, "peft_config")
        assert not any("lora" in type(m).__module__ for m in model.modules())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert len(report.losses) * BATCH * LENGTH == report.tokens

    def test_loss_does_not_rise(self, name):
        model, structure = cut_model()
        ids = stream().view(20, 30)
        before = plain_loss(model, ids)
        run(name, model, structure, **({} if name == "none" else {"lr": 3e-3}))
        assert plain_loss(model, ids) <= before

    def test_same_seed_same_bits(self, name):
        results = []
        for noise in (0, 1):
            torch.manual_seed(noise)
            model, structure = cut_model()
            run(name, model, structure)
            results.append(model.state_dict())
        assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])

    def test_outer_random_state_stays(self, name):
        model, structure = cut_model()
        state = torch.get_rng_state()
        run(name, model, structure)
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_trained_model_generates(self, name):
        model, structure = cut_model()
        run(name, model, structure)
        out = model.generate(stream(8).view(1, 8), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert out.shape == (1, 11)

    def test_what_trains_names_its_stream(self, name):
        entry = RECOVERY.get(name)
        fields = entry.options.__dataclass_fields__
        assert name == "none" or {"corpus", "tokens", "distill"} <= set(fields)
