"""The pipeline's steps on a CUDA device in bfloat16: what holds on the CPU holds there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adasearch import models
from adasearch.config import component
from adasearch.pruning import architectures, calibration, compensation, importance, surgery
from adasearch.registry import COMPENSATION, IMPORTANCE, RECOVERY
from adasearch.sections import UnitsConfig
from adasearch.tuning import scoring
from adasearch.tuning.items import Item
from adasearch.tuning.recovery import RecoveryContext
from tests.tiny import FAMILIES, random_plan, tiny_config, tiny_structure, tiny_tokenizer, tiny_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")
TOKENS = torch.randint(3, 200, (6, 48), generator=torch.Generator().manual_seed(0))


def half_widths(structure):
    return {g.name: max(1, g.width // 2) for g in structure.groups}


def parts(family="llama", attention="head", dtype=torch.bfloat16, biases=()):
    config = tiny_config(family)
    structure, units = tiny_structure(config, attention)
    plan = random_plan(structure, units, half_widths(structure), biases=biases)
    return config, tiny_weights(config, dtype), structure, plan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["kv_group", "head"])
def test_cut_equals_zeroed(family, attention):
    config, weights, structure, plan = parts(family, attention)
    small = surgery.cut(config, weights, structure, plan).to(DEVICE)
    zeroed = surgery.zeroed(config, weights, structure, plan).to(DEVICE)
    with torch.no_grad():
        ours, theirs = small(TOKENS.to(DEVICE)).logits.float(), zeroed(TOKENS.to(DEVICE)).logits.float()
    scale = theirs.abs().max().item()
    assert (ours - theirs).abs().max().item() <= 0.03 * scale
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item() > 0.97


def test_statistics_and_scores_agree_with_the_cpu():
    config, weights, structure, _ = parts(dtype=torch.float32)
    dense = random_plan(structure, UnitsConfig(attention="head"), structure.dense_widths())
    needs = frozenset({"moments", "covariance", "gradient", "fisher"})
    found = []
    for device in ("cpu", "cuda"):
        model = surgery.cut(config, weights, structure, dense).to(device)
        statistics = calibration.collect(model, structure, TOKENS, needs)
        for name in ("wanda_sp", "flap", "taylor", "obs"):
            chosen = component(IMPORTANCE, name, "t")
            found.append(importance.score_all(structure, weights, statistics, chosen, 0))
    half = len(found) // 2
    for one, two in zip(found[:half], found[half:], strict=True):
        for group in one:
            torch.testing.assert_close(one[group], two[group], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["bias", "least_squares"])
def test_compensation_on_the_device_lowers_the_error(name):
    chosen = component(COMPENSATION, name, "t")
    config = tiny_config()
    structure, _ = tiny_structure(config, "head")
    biases = compensation.bias_modules(chosen, structure)
    config, weights, structure, plan = parts(dtype=torch.float32, biases=biases)
    dense = random_plan(structure, UnitsConfig(attention="head"), structure.dense_widths())
    reference = surgery.cut(config, weights, structure, dense).to(DEVICE)
    statistics = calibration.collect(reference, structure, TOKENS, compensation.needs(chosen))
    with torch.no_grad():
        want = reference(TOKENS.to(DEVICE)).logits
        model = surgery.cut(config, weights, structure, plan).to(DEVICE)
        before = (model(TOKENS.to(DEVICE)).logits - want).square().mean()
        compensation.apply(model, structure, plan, statistics, weights, chosen)
        assert (model(TOKENS.to(DEVICE)).logits - want).square().mean() < before


@pytest.mark.parametrize("name", ["lora", "full"])
def test_recovery_on_the_device_lowers_the_loss(name):
    config, weights, structure, plan = parts()
    model = surgery.cut(config, weights, structure, plan).to(DEVICE)
    chosen = component(RECOVERY, {"type": name, "tokens": 4096, "length": 32, "batch": 4, "lr": 5e-3}, "t")
    stream = torch.arange(4096) % 7 + 3
    entry = RECOVERY.get(name)
    report = entry.function(model, structure, stream, chosen.options, RecoveryContext(seed=0, device="cuda"))
    assert np.mean(report.losses[-4:]) < report.losses[0]
    assert next(model.parameters()).device.type == "cuda"
    assert next(model.parameters()).dtype == torch.bfloat16


def test_packed_scores_equal_plain_rows():
    config, weights, structure, plan = parts(dtype=torch.float32)
    model = surgery.cut(config, weights, structure, plan).to(DEVICE)
    choices = (" one", " a longer choice", " two", " x")
    items = [
        Item(task="t", id=str(i), contexts=("some text " * (i + 1),), choices=choices, gold=0, lengths=(4, 16, 4, 2))
        for i in range(8)
    ]
    encoded = scoring.encode(items, tiny_tokenizer(), 512)
    assert scoring.path_difference(model, encoded) < 1e-3


def test_the_structure_counts_what_lies_on_the_device():
    config, weights, structure, plan = parts("qwen3")
    assert architectures.supported()
    model = surgery.cut(config, weights, structure, plan).to(DEVICE)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters


def test_the_share_of_gpu_memory_bounds_a_process_and_sizes_are_told():
    (total, *_) = models.gpu_sizes()
    assert total > 2**30
    models.limit_gpu_memory(0.05)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(total * 0.06), dtype=torch.uint8, device=DEVICE)
        assert torch.empty(int(total * 0.01), dtype=torch.uint8, device=DEVICE).is_cuda
    finally:
        models.limit_gpu_memory(1.0)
