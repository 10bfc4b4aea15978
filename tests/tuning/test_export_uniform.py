"""Padded exports: stock classes open them without code of ours, and zeros change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adasearch.errors import ModelError
from adasearch.pruning import surgery
from adasearch.pruning.plan import make_plan
from adasearch.tuning.export import Goods, ModelCard, _verify, hf_uniform
from tests.test_outlined import OUTLINES, cut_to
from tests.test_outlined import make_base as outlined_base
from tests.tiny import tiny_structure
from tests.tuning.test_export import UNEVEN, logits, make_case


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)


def stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("family", "biases", "opens_as"),
    [
        ("llama", False, "LlamaForCausalLM"),
        ("mistral", False, "MistralForCausalLM"),
        ("qwen2", False, "Qwen2ForCausalLM"),
        ("qwen3", False, "Qwen3ForCausalLM"),
        ("llama", True, "LlamaForCausalLM"),
        ("qwen2", True, "LlamaForCausalLM"),
    ],
)
def test_stock_classes_open_uneven_widths(family: str, biases: bool, opens_as: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path, UNEVEN, biases=biases)
    report = case.export(tmp_path / "out", name="hf_uniform")
    assert report.layout == "stock"
    opened = stock(tmp_path / "out")
    assert type(opened).__name__ == opens_as
    assert torch.allclose(logits(opened), logits(case.model), atol=1e-5)
    assert (opened.config.num_attention_heads, opened.config.intermediate_size) == (8, 40)


def test_narrower_than_dense_where_all_layers_are(tmp_path: Path) -> None:
    case = make_case("qwen3", tmp_path, [(2, 17), (1, 30), (2, 9)])
    report = case.export(tmp_path / "out", hf_uniform.HfUniformOptions(multiple_of=8), name="hf_uniform")
    config = stock(tmp_path / "out").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 32)
    hidden, head = 48, 6
    # one layer lacks one group: two heads of q and o, one of k and v; channels have three rows or columns
    zeros = (2 + 2 + 1 + 1) * head * hidden + 3 * hidden * (32 * 3 - 17 - 30 - 9)
    assert report.padding == zeros
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"{zeros:,} parameters ({4 * zeros:,} bytes) more than the plan's" in text
    assert f"{case.plan.parameters:,}" in text
    assert "trust_remote_code" not in text


def test_heads_within_groups(tmp_path: Path) -> None:
    changes = {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 4}
    case = make_case("llama", tmp_path, [(2, 40), (1, 40), (3, 40)], attention="head", **changes)
    case.export(tmp_path / "out", name="hf_uniform")
    opened = stock(tmp_path / "out")
    # 9 heads do not divide 48, which Llama asks for: 12 do
    assert opened.config.num_attention_heads == 12
    assert torch.allclose(logits(opened), logits(case.model), atol=1e-5)


def test_units_of_zero_are_zero(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, UNEVEN)
    case.export(tmp_path / "out", name="hf_uniform")
    layer = stock(tmp_path / "out").model.layers[1]
    assert not layer.mlp.up_proj.weight[17:].any()
    assert not layer.mlp.down_proj.weight[:, 17:].any()
    assert not layer.self_attn.q_proj.weight[12:].any()
    assert not layer.self_attn.o_proj.weight[:, 12:].any()
    assert layer.mlp.up_proj.weight[:17].all()


@pytest.mark.parametrize("outline", ["attention", "mixed"])
def test_absent_sublayers(outline: str, tmp_path: Path) -> None:
    small, structure = cut_to(outlined_base("llama"), OUTLINES[outline])
    plan = make_plan(structure, tiny_structure(small.config)[1], {}, {})
    model = surgery.cut(small.config, small.weights, structure, plan)
    goods = Goods(model=model, base=small, structure=structure, plan=plan, card=ModelCard(model="tiny"))
    hf_uniform.export(goods, tmp_path / "out", hf_uniform.HfUniformOptions())
    assert torch.allclose(logits(stock(tmp_path / "out")), logits(model), atol=1e-5)
    assert "absent_sublayers" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_biases_without_a_place(tmp_path: Path) -> None:
    case = make_case("qwen3", tmp_path, UNEVEN, biases=True)
    with pytest.raises(ModelError, match=r"no place for model\.layers\.\d\.mlp\.down_proj\.bias"):
        case.export(tmp_path / "out", name="hf_uniform")
    assert list(tmp_path.iterdir()) == []
