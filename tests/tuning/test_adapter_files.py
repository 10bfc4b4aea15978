"""Adapters beside an export: what PEFT makes of the folder is what was merged, and so is what we make of it."""

import dataclasses
import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from adasearch import loading
from adasearch.config import component, export_formats
from adasearch.errors import ConfigError, ModelError
from adasearch.registry import EXPORT, RECOVERY
from adasearch.trial import _keep
from adasearch.tuning import adapter_files, export
from adasearch.tuning.decoder import Update
from adasearch.tuning.export import _verify, hf
from adasearch.tuning.recovery import RecoveryContext
from tests.tuning.test_export import LAYERS, UNEVEN, make_case

BESIDE = hf.HfOptions(adapters="beside")
EVEN = [(3, 24)] * LAYERS
RUN = {"tokens": 256, "length": 16, "batch": 2, "lr": 0.02, "rank": 4}
RECOVERIES = {
    "lora": {"type": "lora"},
    "some": {"type": "lora", "targets": ["q", "down"], "scaling": "rslora", "ranks": "by_cut", "rank": 3},
    "dora": {"type": "lora", "dora": True},
    "adalora": {"type": "adalora"},
    "prunedlora": {"type": "prunedlora"},
    "prune_peft": {"type": "prune_peft"},
}


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    room = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", room)
    monkeypatch.syspath_prepend(room)


def tuned(folder, recovery, widths=UNEVEN, family="llama", **changes):
    """Return a cut model after a recovery, its case, and what was kept of its updates."""
    case = make_case(family, folder, widths, **changes)
    wanted = component(RECOVERY, {**RUN, **recovery}, "recovery")
    found = {}
    context = RecoveryContext(keep=lambda updates: _keep(case.model, found, updates))
    tokens = torch.randint(0, 64, (256,), generator=torch.Generator().manual_seed(0))
    RECOVERY.get(wanted.type).function(case.model, case.structure, tokens, wanted.options, context)
    return case, found


def beside(case, kept, folder):
    return EXPORT.get("hf").function(dataclasses.replace(case.goods, beside=kept), folder, BESIDE)


def logits(model):
    return _verify.logits_of(model)


@pytest.mark.parametrize("name", RECOVERIES)
def test_peft_and_we_open_what_was_merged(name, tmp_path):
    case, kept = tuned(tmp_path, RECOVERIES[name], EVEN)
    report = beside(case, kept, tmp_path / "out")
    assert report.verified.sound
    assert report.layout == "stock"
    merged = logits(case.model)
    assert torch.allclose(logits(loading.load(tmp_path / "out")), merged, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(base)
    assert not torch.allclose(before, merged, atol=1e-3), "the weights in the folder are those before the recovery"
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert torch.allclose(logits(opened), merged, atol=1e-5)
    assert torch.allclose(logits(opened.merge_and_unload()), merged, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_that_differ(family, tmp_path):
    case, kept = tuned(tmp_path, {"type": "lora"}, family=family)
    report = beside(case, kept, tmp_path / "out")
    assert report.layout == "per_layer"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    assert torch.allclose(logits(opened), logits(case.model), atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_half_precision_is_rounded_once_as_in_the_merge(name, tmp_path):
    case, kept = tuned(tmp_path, RECOVERIES[name], dtype=torch.bfloat16)
    assert beside(case, kept, tmp_path / "out").verified.difference == 0.0
    opened = loading.load(tmp_path / "out")
    assert opened.dtype == torch.bfloat16
    if name == "lora":
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), case.model.parameters(), strict=True))


def test_the_folder_says_what_it_is(tmp_path):
    case, kept = tuned(tmp_path, {"type": "lora", "targets": "attention", "rank": 2, "alpha": 6.0})
    beside(case, kept, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(LAYERS) for p in "qkvo"]
    assert told["target_modules"] == names
    assert told["rank_pattern"] == dict.fromkeys(names, 2)
    assert told["alpha_pattern"] == pytest.approx(dict.fromkeys(names, 6.0))
    assert "PeftModel.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    sums = (tmp_path / "out" / "SHA256SUMS").read_text()
    assert "  adapter/adapter_model.safetensors\n" in sums
    assert loading.verify(tmp_path / "out", fresh=False).sound


def test_damage_is_found(tmp_path):
    case, kept = tuned(tmp_path, {"type": "lora"})
    beside(case, kept, tmp_path / "out")
    (tmp_path / "out" / "adapter" / "more.safetensors").write_bytes(b"x")
    problems = loading.verify(tmp_path / "out", fresh=False).problems
    assert problems == ("adapter/more.safetensors is not listed in SHA256SUMS",)
    (tmp_path / "out" / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    assert (
        "adapter/adapter_model.safetensors has changed since it was written"
        in loading.verify(tmp_path / "out", fresh=False).problems
    )
    with pytest.raises(ModelError, match="adapter: cannot be merged"):
        loading.load(tmp_path / "out")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, widths in (("a", UNEVEN), ("b", EVEN)):
        case, kept = tuned(tmp_path / name, {"type": "lora"}, widths)
        beside(case, kept, tmp_path / name / "out")
    shutil.rmtree(tmp_path / "a" / "out" / "adapter")
    shutil.copytree(tmp_path / "b" / "out" / "adapter", tmp_path / "a" / "out" / "adapter")
    with pytest.raises(ModelError, match="cannot be merged"):
        loading.load(tmp_path / "a" / "out")


def test_sums_that_lead_out_of_the_folder_are_refused(tmp_path):
    case, kept = tuned(tmp_path, {"type": "lora"})
    beside(case, kept, tmp_path / "out")
    with (tmp_path / "out" / "SHA256SUMS").open("a") as file:
        file.write("0  ../case.txt\n0  /etc/hostname\n")
    problems = loading.verify(tmp_path / "out", fresh=False).problems
    assert [p for p in problems if "must list files of this folder" in p] == list(problems)
    assert len(problems) == 2


def test_ranks_that_add_nothing_are_left_out():
    module = torch.nn.Linear(5, 4, bias=False)
    a, b = torch.randn(3, 5), torch.randn(4, 3)
    a[1], b[:, 2] = 0, 0
    found = adapter_files.Kept.of(module, Update(a, b, 2.0))
    assert (found.a.shape, found.b.shape) == ((1, 5), (4, 1))
    assert adapter_files.config_of({"x": found})["alpha_pattern"] == {"x": 2.0}
    before, whole = module.weight.clone(), torch.nn.Linear(5, 4, bias=False)
    found.apply(module)
    assert torch.allclose(module.weight, before + 2.0 * b @ a, atol=1e-6)
    assert adapter_files.Kept.of(whole, Update(a, torch.zeros(4, 3), 2.0)) is None


def test_adapters_that_are_not_there_are_refused(tmp_path):
    case = make_case("llama", tmp_path, EVEN)
    with pytest.raises(ModelError, match="this one has none"):
        case.export(tmp_path / "out", BESIDE)
    formats = export_formats(["hf", {"type": "hf", "adapters": "beside"}], "finalize.formats")
    assert export.wants_adapters(formats)
    assert not export.wants_adapters(formats[:1])
    assert [item.options.label for item in formats] == ["", "adapters"]
    for name in RECOVERIES:
        export.check(formats, component(RECOVERY, RECOVERIES[name], ""), "finalize.formats")
    with pytest.raises(ConfigError, match=r"finalize.formats: adapters: beside needs .*lora.*given full"):
        export.check(formats, component(RECOVERY, "full", ""), "finalize.formats")
    export.check(formats[:1], component(RECOVERY, "full", ""), "finalize.formats")
