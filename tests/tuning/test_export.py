"""Export, load, verify: what is written opens as the same model, and nothing else is ever put in its place."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adasearch import loading, modeling_adasearch, models
from adasearch.config import TaskScore
from adasearch.errors import ModelError, StorageError
from adasearch.pruning import architectures, surgery
from adasearch.pruning.plan import PruningPlan, make_plan
from adasearch.pruning.projection import project
from adasearch.records import FinalRecord
from adasearch.registry import EXPORT
from adasearch.sections import BudgetConfig, UnitsConfig
from adasearch.tuning.export import MARKER, SUMS, Goods, ModelCard, _folder, _verify, hf

LAYERS = 3
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@dataclass
class Case:
    """A cut tiny model and all that its export needs."""

    base: models.BaseModel
    structure: Any
    plan: PruningPlan
    model: Any

    @property
    def goods(self) -> Goods:
        return Goods(model=self.model, base=self.base, structure=self.structure, plan=self.plan, card=CARD)

    def export(self, folder: Path, options: Any = None, *, name: str = "hf", **settings: Any) -> Any:
        entry = EXPORT.get(name)
        return entry.function(self.goods, folder, options or entry.options(), **settings)


SCORE = TaskScore(
    task="made|up", n=7, acc=0.5, acc_stderr=0.1, acc_norm=None, acc_norm_stderr=None, margin=0.2, margin_stderr=0.1
)
CARD = ModelCard(
    model="someone/tiny",
    study="a study",
    trial=3,
    config={"importance": {"type": "wanda_sp"}},
    record=FinalRecord(
        name="trial3", trial=3, role="finalist", recipe=None, selected=(), report=(SCORE,),
        perplexity={"pydoc@128": 12.5}, parameters=1, removed=0.2, seconds={}, export=None, losses=(),
    ),
)  # fmt: skip


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    raw = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    raw.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0")


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a")]
BYTES = 272
"""Rows of an embedding that has room for every byte."""


def byte_tokenizer() -> Any:
    """Byte-level BPE with a few merges: any text goes in and comes out again."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    names = ["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
    raw = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=MERGES))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return made


def make_base(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> models.BaseModel:
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True}
    config = CONFIGS[family](**{**sizes, **heads, "bos_token_id": 1, "eos_token_id": 2, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    shape = models.shape_of(config)
    return models.BaseModel(
        folder=folder,
        config=config,
        tokenizer=byte_tokenizer() if shape.vocabulary >= BYTES else tokenizer(),
        shape=shape,
        weights=weights,
        dtype=dtype,
    )


def make_case(
    family: str,
    folder: Path,
    widths: list[tuple[int, int]],
    *,
    biases: bool = False,
    attention: str = "kv_group",
    **changes: Any,
) -> Case:
    """Return a model cut to (attention width, MLP width) per layer."""
    base = make_base(family, folder, **changes)
    units = UnitsConfig(attention=attention)  # type: ignore[arg-type]
    structure = architectures.describe(base.shape, units)
    wanted = {g.name: widths[g.layer][0 if g.kind == "attention" else 1] for g in structure.groups}
    torch.manual_seed(1)
    scores = {g.name: torch.rand(g.units) for g in structure.groups}
    plan = make_plan(structure, units, scores, wanted, [g.output for g in structure.groups[1::2]] if biases else ())
    model = surgery.cut(base.config, base.weights, structure, plan)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter.data)
    return Case(base, structure, plan, model)


UNEVEN = [(3, 31), (1, 17), (4, 40)]


@pytest.fixture(autouse=True)
def _modules_elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the modelling files that transformers copies out of the user's cache."""
    room = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", room)
    monkeypatch.syspath_prepend(room)


@pytest.fixture
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that a fresh interpreter needs; one test below pays them."""
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    room = tmp_path_factory.mktemp("uneven")
    case = make_case("llama", room, UNEVEN, biases=True)
    report = case.export(room / "out")
    assert report.verified.fresh
    assert report.verified.sound
    assert report.verified.difference == 0.0
    return case, room / "out"


def logits(model: Any) -> torch.Tensor:
    return _verify.logits_of(model)


class TestUneven:
    def test_files(self, uneven: tuple[Case, Path]) -> None:
        names = {p.name for p in uneven[1].iterdir()}
        assert {
            "model.safetensors",
            "config.json",
            "plan.json",
            "README.md",
            modeling_adasearch.FILE_NAME,
            MARKER,
            SUMS,
        } <= names
        assert {"tokenizer.json", "tokenizer_config.json"} <= names
        assert not [p for p in uneven[1].parent.iterdir() if p.name != "out"]

    def test_checksums_are_those_of_coreutils(self, uneven: tuple[Case, Path]) -> None:
        subprocess.run(["sha256sum", "--quiet", "-c", SUMS], cwd=uneven[1], check=True)

    def test_plan_is_shipped(self, uneven: tuple[Case, Path]) -> None:
        assert PruningPlan.load(uneven[1] / "plan.json") == uneven[0].plan

    def test_adasearch_load_runs_no_code_of_the_folder(self, uneven: tuple[Case, Path], tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(uneven[1], copy)
        (copy / modeling_adasearch.FILE_NAME).write_text("raise SystemExit('this code must not run')")
        assert torch.equal(logits(loading.load(copy)), logits(uneven[0].model))

    def test_transformers_with_trust(self, uneven: tuple[Case, Path], tmp_path: Path) -> None:
        opened = transformers.AutoModelForCausalLM.from_pretrained(uneven[1], trust_remote_code=True)
        assert torch.equal(logits(opened), logits(uneven[0].model))
        assert sum(p.numel() for p in opened.parameters()) == uneven[0].plan.parameters
        assert opened.lm_head.weight is opened.model.embed_tokens.weight
        transformers.AutoTokenizer.from_pretrained(uneven[1])

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_generate_with_cache(self, uneven: tuple[Case, Path], cache: str) -> None:
        opened = loading.load(uneven[1])
        ids = _verify.prompts(64)[:2]
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        plain = opened.generate(ids, use_cache=False, **options)
        assert torch.equal(plain, opened.generate(ids, cache_implementation=cache, **options))

    @pytest.mark.parametrize("opener", ["load", "trust"])
    def test_saved_again_it_is_the_same(self, uneven: tuple[Case, Path], tmp_path: Path, opener: str) -> None:
        if opener == "load":
            opened = loading.load(uneven[1])
        else:
            opened = transformers.AutoModelForCausalLM.from_pretrained(uneven[1], trust_remote_code=True)
        opened.save_pretrained(tmp_path / "again")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert torch.equal(logits(again), logits(uneven[0].model))
        assert torch.equal(logits(loading.load(tmp_path / "again")), logits(uneven[0].model))
        one, two = (json.loads((f / "config.json").read_text()) for f in (uneven[1], tmp_path / "again"))
        assert one == two

    def test_standard_field(self, uneven: tuple[Case, Path]) -> None:
        data = json.loads((uneven[1] / "config.json").read_text())
        assert data["per_layer_config"]["0"] == {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "intermediate_size": 31,
        }
        assert "2" not in data["per_layer_config"]  # a dense layer needs none

    def test_without_trust_it_is_refused(self, uneven: tuple[Case, Path]) -> None:
        with pytest.raises(ValueError, match="trust_remote_code"):
            transformers.AutoModelForCausalLM.from_pretrained(uneven[1], trust_remote_code=False)

    def test_the_stock_class_refuses_it(self, uneven: tuple[Case, Path]) -> None:
        with pytest.raises(RuntimeError, match="per-layer"):
            transformers.LlamaForCausalLM.from_pretrained(uneven[1])

    def test_attention_kernel_can_be_changed(self, uneven: tuple[Case, Path]) -> None:
        opened = loading.load(uneven[1])
        opened.set_attn_implementation("eager")
        assert opened.model.layers[1].self_attn.config._attn_implementation == "eager"
        assert torch.allclose(logits(opened), logits(uneven[0].model), atol=1e-4)

    def test_gradients_reach_every_layer(self, uneven: tuple[Case, Path]) -> None:
        opened = loading.load(uneven[1])
        ids = _verify.prompts(64)[:2]
        opened(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in opened.parameters())

    def test_verify_later(self, uneven: tuple[Case, Path]) -> None:
        report = loading.verify(uneven[1], fresh=False)
        assert report.sound
        assert report.parameters == report.expected == uneven[0].plan.parameters
        assert report.difference <= 1e-3
        assert "sound" in next(iter(report.lines()))

    def test_card(self, uneven: tuple[Case, Path]) -> None:
        text = (uneven[1] / "README.md").read_text()
        assert f"{uneven[0].plan.parameters:,}" in text
        assert "50.00 ± 10.00" in text
        assert "made\\|up" in text
        assert "12.500" in text
        assert "base_model: someone/tiny" in text
        assert "unknown to adasearch" in text
        assert str(uneven[1]) not in text


class TestDamage:
    @pytest.fixture
    def copy(self, uneven: tuple[Case, Path], tmp_path: Path) -> Path:
        return Path(shutil.copytree(uneven[1], tmp_path / "copy"))

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "plan.json", "README.md"])
    def test_changed_file(self, copy: Path, name: str) -> None:
        data = bytearray((copy / name).read_bytes())
        data[-2] ^= 1
        (copy / name).write_bytes(bytes(data))
        report = loading.verify(copy, fresh=False)
        assert not report.sound
        assert name in report.problems[0]
        with pytest.raises(ModelError, match=name):
            report.require()

    def test_missing_file(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        assert loading.verify(copy, fresh=False).problems == ("tokenizer.json is missing",)

    def test_stray_weights(self, copy: Path) -> None:
        (copy / "other.safetensors").write_bytes(b"x")
        assert not loading.verify(copy, fresh=False).sound

    def test_other_weights_under_new_checksums(self, copy: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(copy / "model.safetensors")
        state["model.norm.weight"] += 1
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        _folder.seal(copy)
        assert "logits differ" in loading.verify(copy, fresh=False).problems[0]

    def test_truncated_weights_cannot_be_loaded(self, copy: Path) -> None:
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(ModelError, match="cannot be opened"):
            loading.load(copy)

    def test_missing_tensor_cannot_be_loaded(self, copy: Path) -> None:
        from safetensors.torch import load_file, save_file

        state = load_file(copy / "model.safetensors")
        del state[
            "model.layers.0.mlp.down_proj.bias" if "model.layers.0.mlp.down_proj.bias" in state else "model.norm.weight"
        ]
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="missing keys"):
            loading.load(copy)

    def test_not_an_export(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="must be an export"):
            loading.verify(tmp_path)
        with pytest.raises(ModelError, match=r"config\.json"):
            loading.load(tmp_path)

    def test_foreign_modelling_file_is_not_run(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (copy / modeling_adasearch.FILE_NAME).write_text("raise SystemExit('this code must not run')")
        assert _verify.open_and_compare(copy, None, "cpu").difference <= 1e-3


@pytest.mark.usefixtures("_in_process")
class TestUniform:
    def test_stock_classes_open_it(self, tmp_path: Path) -> None:
        case = make_case("llama", tmp_path, [(3, 24)] * LAYERS)
        report = case.export(tmp_path / "out")
        assert report.layout == "stock"
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(opened) is transformers.LlamaForCausalLM
        assert torch.equal(logits(opened), logits(case.model))
        assert opened.config.num_attention_heads == 6
        assert not (tmp_path / "out" / modeling_adasearch.FILE_NAME).exists()

    @pytest.mark.parametrize("family", sorted(CONFIGS))
    @pytest.mark.parametrize("remove", [0.15, 0.3, 0.45])
    def test_a_budget_of_uniform_widths_needs_no_code_of_ours(self, family: str, remove: float, tmp_path: Path) -> None:
        changes = {"num_attention_heads": 8, "num_key_value_heads": 8}
        structure = architectures.describe(make_base(family, tmp_path, **changes).shape, UnitsConfig())
        asked = BudgetConfig(remove=remove, uniform=True)
        widths = project(structure, {g.name: 1.0 + g.layer for g in structure.groups}, asked)
        pairs = [tuple(widths[g.name] for g in structure.groups if g.layer == layer) for layer in range(LAYERS)]
        case = make_case(family, tmp_path, pairs, **changes)
        assert case.export(tmp_path / "out").layout == "stock"
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(logits(opened), logits(case.model))
        assert sum(p.numel() for p in opened.parameters()) <= (1 - remove) * structure.parameters

    def test_heads_that_llama_refuses(self, tmp_path: Path) -> None:
        changes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 6}
        case = make_case("llama", tmp_path, [(5, 24)] * LAYERS, **changes)
        assert case.export(tmp_path / "out").layout == "per_layer"
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert torch.equal(logits(opened), logits(case.model))

    def test_extra_biases_need_our_class(self, tmp_path: Path) -> None:
        case = make_case("qwen2", tmp_path, [(3, 24)] * LAYERS, biases=True)
        assert case.export(tmp_path / "out").layout == "per_layer"
        with pytest.raises(RuntimeError, match="per-layer"):
            transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "out")

    @pytest.mark.parametrize("widths", [UNEVEN, [(3, 24)] * LAYERS])
    def test_sharded(self, tmp_path: Path, widths: list[tuple[int, int]]) -> None:
        case = make_case("llama", tmp_path, widths)
        assert case.export(tmp_path / "out", hf.HfOptions(shard="20KB")).verified.sound
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 1
        assert all(shard.stat().st_size < 30_000 for shard in shards)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        listed = (tmp_path / "out" / SUMS).read_text()
        assert all(name in listed for name in ("index.json", *(shard.name for shard in shards)))
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
        assert torch.equal(logits(opened), logits(case.model))

    def test_generation_config_is_that_of_the_base(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text('{"max_length": 99}')
        case = make_case("llama", tmp_path, UNEVEN)
        case.export(tmp_path / "out")
        assert loading.load(tmp_path / "out").generation_config.max_length == 99


@pytest.mark.usefixtures("_in_process")
class TestTarget:
    @pytest.fixture
    def case(self, tmp_path: Path) -> Case:
        return make_case("llama", tmp_path, UNEVEN)

    def test_foreign_folder_is_refused(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("years of work")
        for overwrite in (False, True):
            with pytest.raises(StorageError, match="must be empty"):
                case.export(tmp_path / "out", overwrite=overwrite)
        assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"

    def test_earlier_export(self, case: Case, tmp_path: Path) -> None:
        case.export(tmp_path / "out")
        with pytest.raises(StorageError, match="earlier export"):
            case.export(tmp_path / "out")
        (tmp_path / "out" / "README.md").write_text("old")
        case.export(tmp_path / "out", overwrite=True)
        assert (tmp_path / "out" / "README.md").read_text() != "old"
        assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def test_empty_folder(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "deep" / "out").mkdir(parents=True)
        assert case.export(tmp_path / "deep" / "out").verified.sound

    def test_model_that_is_not_the_plan(self, case: Case, tmp_path: Path) -> None:
        other = make_case("llama", tmp_path, [(2, 16)] * LAYERS)
        with pytest.raises(ModelError, match="by the plan"):
            Case(case.base, case.structure, case.plan, other.model).export(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_what_does_not_open_is_not_left_behind(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = hf.write_weights

        def damaged(state: Any, draft: Path, shard: str, *, tied: bool) -> None:
            write(state, draft, shard, tied=tied)
            path = draft / "model.safetensors"
            path.write_bytes(path.read_bytes()[:-100])

        monkeypatch.setattr(hf, "write_weights", damaged)
        with pytest.raises(ModelError, match="not written"):
            case.export(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verify, "_open_fresh", _verify.open_and_compare)
    case = make_case("qwen3", tmp_path, UNEVEN, dtype=torch.bfloat16)
    report = case.export(tmp_path / "out")
    assert report.verified.difference == 0.0
    assert loading.load(tmp_path / "out").dtype == torch.bfloat16


def test_fresh_process_says_what_is_wrong(uneven: tuple[Case, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(uneven[1], tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be opened"):
        _verify._open_fresh(copy, None, "cpu")


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys, adasearch.loading, adasearch.tuning.export; assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
