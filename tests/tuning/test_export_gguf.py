"""GGUF: what llama.cpp will find in the file, read by the gguf package and, if it knows the graph, by transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from adasearch import loading
from adasearch.errors import ModelError, StorageError
from adasearch.pruning import surgery
from adasearch.pruning.plan import make_plan
from adasearch.tuning.export import Goods, ModelCard, _gguf, _verify, gguf
from adasearch.tuning.export._gguf_tokenizer import gguf_tokenizer
from tests.test_outlined import OUTLINES, cut_to
from tests.test_outlined import make_base as outlined_base
from tests.tiny import tiny_structure
from tests.tuning.test_export import BYTES, LAYERS, MERGES, UNEVEN, byte_tokenizer, logits, make_case, tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)


def f32() -> gguf.GgufOptions:
    return gguf.GgufOptions(dtype="f32")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return fields and tensors as the gguf package reads them."""
    reader: Any = gguf_package.GGUFReader(folder / loading.GGUF)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def numbers(tensor: Any) -> np.ndarray:
    return gguf_package.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_and_array(dtype: str, tmp_path: Path) -> None:
    case = make_case("qwen2", tmp_path, UNEVEN, biases=True, vocab_size=BYTES, hidden_size=64)
    report = case.export(tmp_path / "out", gguf.GgufOptions(dtype=dtype), name="gguf")
    assert report.layout == "gguf"
    assert report.verified.difference < 1e-4
    fields, tensors = read(tmp_path / "out")
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2 * a for a, _ in UNEVEN]
    assert fields["deci.attention.head_count_kv"] == [a for a, _ in UNEVEN]
    assert fields["deci.feed_forward_length"] == [m for _, m in UNEVEN]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 6
    assert fields["deci.block_count"] == LAYERS
    state = {name: p.detach().numpy() for name, p in case.model.named_parameters()}
    assert sum(math.prod(t.shape.tolist()) for t in tensors.values()) == case.plan.parameters
    assert len(tensors) == len(state)
    for own, stored in _gguf.LAYER_NAMES.items():
        for index in range(LAYERS):
            for kind in ("weight", "bias"):
                weight, found = (
                    state.get(f"model.layers.{index}.{own}.{kind}"),
                    tensors.get(f"blk.{index}.{stored}.{kind}"),
                )
                assert (weight is None) == (found is None)
                if found is not None:
                    self_check(weight, found, stored, dtype)
    assert "output.weight" not in tensors  # the embedding is the output layer
    self_check(state["model.embed_tokens.weight"], tensors["token_embd.weight"], "token_embd", dtype)


def self_check(weight: np.ndarray, found: Any, stored: str, dtype: str) -> None:
    """Compare a tensor with what was exported, within the rounding of its number format."""
    told = found.tensor_type.name.lower()
    blocks = weight.ndim == 2 and weight.shape[1] % 32 == 0
    assert told == ("f32" if weight.ndim == 1 else "f16" if dtype == "q8_0" and not blocks else dtype)
    seen = numbers(found).reshape(weight.shape)
    if stored in {"attn_q", "attn_k"}:  # rows i and i + 3 of a head of 6 became 2 i and 2 i + 1
        order = [row + 6 * head for head in range(len(weight) // 6) for row in (0, 3, 1, 4, 2, 5)]
        weight = weight[order]
    bound = np.abs(weight) * {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8, "q8_0": 0.0}[told] + 1e-7
    if told == "q8_0":
        # half a step, and the step itself is rounded to f16: 127 · 2^-11 of it at the largest number
        step = np.abs(weight).reshape(-1, 32).max(1, keepdims=True) / 127
        bound = bound + np.repeat(step * (0.5 + 127 * 2.0**-11), 32, 1).reshape(weight.shape)
    assert np.all(np.abs(seen - weight) <= bound)


def test_paired_rows_rotate_as_neighbours() -> None:
    heads, d, position = 3, 8, 5
    torch.manual_seed(0)
    rows = torch.randn(heads * d, dtype=torch.float64)
    angles = position * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    first, second = rows.reshape(heads, 2, d // 2).unbind(1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], 1).reshape(-1)
    pairs = torch.view_as_complex(_gguf._paired(rows, heads).reshape(heads, d // 2, 2))
    neighbours = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(-1)
    assert torch.allclose(neighbours, _gguf._paired(turned, heads))
    assert torch.equal(_gguf._halved(_gguf._paired(rows, heads), heads), rows)


@pytest.mark.parametrize(
    ("family", "attention", "width", "graph"),
    # not qwen3: transformers leaves the size of its heads at 128, whatever the file says
    [("llama", "kv_group", 3, "llama"), ("mistral", "kv_group", 2, "llama"), ("qwen2", "none", 4, "qwen2")],
)
def test_transformers_reads_equal_widths(family: str, attention: str, width: int, graph: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path, [(width, 32)] * LAYERS, attention=attention, vocab_size=BYTES)
    case.export(tmp_path / "out", f32(), name="gguf")
    assert read(tmp_path / "out")[0]["general.architecture"] == graph
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=loading.GGUF)
    assert torch.allclose(logits(opened), logits(case.model), atol=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=loading.GGUF)
    text = "in the end, a thing: äß 123"
    assert words(text).input_ids == byte_tokenizer()(text).input_ids
    assert words.chat_template == byte_tokenizer().chat_template
    assert (words.bos_token_id, words.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("family", "changes", "graph"),
    [
        ("llama", {}, "deci"),
        ("mistral", {"sliding_window": None}, "deci"),
        ("qwen2", {}, "deci"),
        ("qwen3", {}, "openelm"),
        ("llama", {"attention_bias": True, "mlp_bias": True}, "deci"),
        ("llama", {"tie_word_embeddings": False}, "deci"),
        ("llama", {"rope_parameters": LLAMA3}, "deci"),
    ],
)
def test_graph_of_uneven_widths(family: str, changes: dict[str, Any], graph: str, tmp_path: Path) -> None:
    case = make_case(family, tmp_path, UNEVEN, vocab_size=BYTES, **changes)
    assert case.export(tmp_path / "out", f32(), name="gguf").verified.sound
    assert read(tmp_path / "out")[0]["general.architecture"] == graph
    assert torch.allclose(logits(loading.load(tmp_path / "out")), logits(case.model), atol=1e-4)


def test_factors_are_those_of_transformers(tmp_path: Path) -> None:
    stretched = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES, rope_parameters=LLAMA3)
    stretched.export(tmp_path / "out", f32(), name="gguf")
    plain = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    factors = torch.from_numpy(numbers(read(tmp_path / "out")[1]["rope_freqs.weight"]).copy())
    ratio = plain.model.model.rotary_emb.inv_freq / stretched.model.model.rotary_emb.inv_freq
    assert torch.allclose(factors, ratio)
    assert ratio.max() > 1.5


@pytest.mark.parametrize("outline", ["attention", "mixed"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_absent_sublayers(family: str, outline: str, tmp_path: Path) -> None:
    small, structure = cut_to(outlined_base(family), OUTLINES[outline])
    plan = make_plan(structure, tiny_structure(small.config)[1], {}, {})
    model = surgery.cut(small.config, small.weights, structure, plan)
    goods = Goods(model=model, base=small, structure=structure, plan=plan, card=ModelCard(model="tiny"))
    report = gguf.export(goods, tmp_path / "out", f32())
    assert report.verified.sound
    assert report.padding >= 0
    assert torch.allclose(logits(loading.load(tmp_path / "out")), logits(model), atol=1e-4)


def test_a_model_without_a_window_is_read_without_one(tmp_path: Path) -> None:
    """Transformers' Mistral has one of 4096 tokens where nothing is said of it."""
    sizes = {"sliding_window": None, "max_position_embeddings": 8192}
    case = make_case("mistral", tmp_path, UNEVEN, vocab_size=BYTES, **sizes)
    case.export(tmp_path / "out", f32(), name="gguf")
    assert loading.load(tmp_path / "out").config.sliding_window is None


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    case = make_case("mistral", tmp_path, UNEVEN, vocab_size=BYTES, sliding_window=48, max_position_embeddings=512)
    case.export(tmp_path / "out", f32(), name="gguf")
    assert read(tmp_path / "out")[0]["deci.context_length"] == 48
    assert "48 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_tokenizer_fields(tmp_path: Path) -> None:
    made = byte_tokenizer()
    found = gguf_tokenizer(made, BYTES)
    assert (found.model, found.split) == ("gpt2", "gpt-2")
    assert found.tokens[:3] == ("<pad>", "<bos>", "<eos>")
    assert found.kinds[:4] == (3, 3, 3, 1)
    assert found.merges == tuple(" ".join(pair) for pair in MERGES)
    assert len(found.tokens) == len(found.kinds) == BYTES
    assert found.kinds[-1] == 5  # a row that no token has
    assert found.ids == {"bos": 1, "eos": 2, "pad": 0}
    assert found.adds == {"bos": False, "eos": False}
    assert found.template == made.chat_template


def test_splits_by_name() -> None:
    made = byte_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert gguf_tokenizer(made, BYTES).split == "smollm"
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    with pytest.raises(ModelError, match=r"\['Whitespace', 'Digits'\], which is none of"):
        gguf_tokenizer(made, BYTES)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ModelError, match="a space before every text"):
        gguf_tokenizer(made, BYTES)


def test_byte_fallback_scores_merge_in_their_order() -> None:
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a", "b", "c", "ab", "bc", "▁"]
    raw = Tokenizer(
        BPE(
            vocab={n: i for i, n in enumerate(names)},
            merges=[("b", "c"), ("a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    found = gguf_tokenizer(made, len(names))
    assert found.model == "llama"
    assert found.scores[names.index("bc")] > found.scores[names.index("ab")] > found.scores[names.index("a")]
    assert found.kinds[0] == 2
    assert found.kinds[names.index("<0x41>")] == 6
    assert found.adds["space_prefix"] is False


def test_what_llama_cpp_cannot_read_is_refused(tmp_path: Path) -> None:
    words = make_case("llama", tmp_path, UNEVEN)
    with pytest.raises(ModelError, match="WordLevel, must be BPE"):
        words.export(tmp_path / "out", name="gguf")
    assert gguf_tokenizer(None, 4).model == "no_vocab"
    with pytest.raises(ModelError, match="must be BPE"):
        gguf_tokenizer(tokenizer(), 64)
    for changes in ({"tie_word_embeddings": False}, {"biases": True}):
        case = make_case("qwen3", tmp_path, UNEVEN, vocab_size=BYTES, **changes)
        with pytest.raises(ModelError, match="widths per layer of qwen3 only where"):
            case.export(tmp_path / "out", name="gguf")
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES, rope_parameters=stretched)
    with pytest.raises(ModelError, match="rotary positions must be default"):
        case.export(tmp_path / "out", name="gguf")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_f16(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    case.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ModelError, match="do not fit f16"):
        case.export(tmp_path / "out", name="gguf")


def test_a_disk_that_is_full_in_the_words_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)

    def short(*_args: Any) -> None:
        raise OSError("13056 requested and 4096 written")

    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", short)
    with pytest.raises(StorageError, match="the disk is full"):
        case.export(tmp_path / "out", name="gguf")


def test_damage_is_found(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    case.export(tmp_path / "out", name="gguf")
    path = tmp_path / "out" / loading.GGUF
    data = bytearray(path.read_bytes())
    data[-100] ^= 64
    path.write_bytes(bytes(data))
    assert "has changed" in loading.verify(tmp_path / "out", fresh=False).problems[0]
    path.write_bytes(bytes(data[: len(data) // 2]))
    with pytest.raises(ModelError, match="cannot be opened"):
        loading.load(tmp_path / "out")
    marker = tmp_path / "out" / "adasearch.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": "onnx"}))
    with pytest.raises(ModelError, match="unknown export format 'onnx'"):
        _verify.open_and_compare(tmp_path / "out", None, "cpu")
