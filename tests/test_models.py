"""Models are found, checked before they are loaded, converted once, mapped, and shared unchanged."""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adasearch import models
from adasearch.errors import ModelError, StorageError
from adasearch.pruning import architectures, surgery
from adasearch.sections import ModelConfig, UnitsConfig
from tests import tiny


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def _resolve(name):
    return models.resolve(ModelConfig(name=str(name)))


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _cut_short(path, by=10):
    path.write_bytes(path.read_bytes()[:-by])


def _shard(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, mine in parts.items() for name in mine}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return folder


def _write_gguf(path, **changes):
    """Write a tiny Llama as GGUF, float32."""
    config = tiny.tiny_config(tie_word_embeddings=True)
    writer = gguf.GGUFWriter(path, changes.get("family", "llama"))
    writer.add_context_length(64)
    writer.add_embedding_length(24)
    writer.add_block_count(2)
    writer.add_feed_forward_length(40)
    writer.add_head_count(6)
    writer.add_head_count_kv(3)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tiny.VOCABULARY)
    if changes.get("tokenizer", True):
        words = tiny.tiny_tokenizer().get_vocab()
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*sorted(words, key=words.get)[:-1], "ab"])
        writer.add_token_types([1] * len(words))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    parts = {"embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip
    for name, weight in tiny.tiny_weights(config).items():
        words = name.removesuffix(".weight").split(".")
        known = next(new for old, new in parts.items() if name.removesuffix(".weight").endswith(old))
        layer = f"blk.{words[2]}." if "layers" in words else ""
        writer.add_tensor(f"{layer}{known}.weight", weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_folder_in_the_right_format_is_used_as_it_is(checkpoint, tmp_path):
    source = _resolve(checkpoint)
    assert (source.kind, source.path) == ("folder", str(checkpoint))
    assert models.fetch_weights(source, tmp_path / "cache", torch.float32) == checkpoint
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_folder_in_another_format_is_converted_once(checkpoint, tmp_path, sharded):
    wanted = {name: t.bfloat16() for name, t in load_file(checkpoint / "model.safetensors").items()}
    source = _resolve(_shard(checkpoint) if sharded else checkpoint)
    folder = models.fetch_weights(source, tmp_path / "cache", torch.bfloat16)
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert models.fetch_weights(source, tmp_path / "cache", torch.bfloat16) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    base = models.open_base(folder, torch.bfloat16)
    assert base.dtype == torch.bfloat16
    assert base.config.dtype == torch.bfloat16
    assert {name for name in wanted if not torch.equal(wanted[name], base.weights[name])} == set()
    left = [p.name for p in (tmp_path / "cache").iterdir() if p != folder and not p.name.endswith(".lock")]
    assert left == []


def _fetch(arguments):
    source, cache = arguments
    return str(models.fetch_weights(source, cache, torch.float16))


@pytest.mark.slow
def test_conversion_by_several_processes_at_once(checkpoint, tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        folders = set(pool.map(_fetch, [(_resolve(checkpoint), tmp_path / "cache")] * 4, chunksize=1))
    assert len(folders) == 1
    assert models.open_base(next(iter(map(type(tmp_path), folders)))).dtype == torch.float16


def test_damaged_conversion_is_made_again(checkpoint, tmp_path):
    source = _resolve(checkpoint)
    folder = models.fetch_weights(source, tmp_path / "cache", torch.float16)
    _cut_short(folder / "model.safetensors")
    rest = folder.with_name(f".{folder.name}.dead.tmp")
    rest.mkdir()
    assert models.fetch_weights(source, tmp_path / "cache", torch.float16) == folder
    assert models.open_base(folder).dtype == torch.float16
    assert not rest.exists()


def test_full_disk_is_a_storage_error(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(StorageError, match="bytes free, has 0"):
        models.fetch_weights(_resolve(checkpoint), tmp_path / "cache", torch.float16)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


def test_base_opens_with_tokenizer_and_shape(checkpoint):
    base = models.open_base(checkpoint)
    assert base.tokenizer.decode(base.tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"
    assert (base.shape.layers, base.shape.heads, base.shape.kv_heads, base.shape.head_dim) == (2, 6, 3, 8)
    assert base.shape == models.describe_source(_resolve(checkpoint))
    assert base.shape.tied
    model = models.dense_model(base)
    assert model.model.embed_tokens.weight.data_ptr() == base.weights["model.embed_tokens.weight"].data_ptr()
    assert not any(p.requires_grad for p in model.parameters())


def test_model_equals_that_of_transformers(checkpoint):
    import transformers

    tokens = torch.arange(3, 40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits
    assert torch.equal(models.dense_model(models.open_base(checkpoint))(tokens).logits, theirs)


def test_own_weights_are_equal_and_no_copies_until_they_are_written(checkpoint):
    base = models.open_base(checkpoint)
    own = models.own_weights(base)
    assert list(own) == list(base.weights)
    name = "model.embed_tokens.weight"
    assert torch.equal(own[name], base.weights[name])
    assert own[name].data_ptr() != base.weights[name].data_ptr()
    own[name].add_(1)
    assert not torch.equal(own[name], base.weights[name])
    assert torch.equal(models.open_base(checkpoint).weights[name], base.weights[name])
    assert models.own_weights(models.open_base(checkpoint, torch.float16)) is None
    (checkpoint / "model.safetensors").unlink()
    assert models.own_weights(base) is None
    assert torch.equal(models.dense_model(base).model.embed_tokens.weight, base.weights[name])


def _write_everywhere(folder, asked, told):
    """Write in place into every weight that a process can reach: base, dense model and cut model."""
    base = models.open_base(folder)
    structure = architectures.describe(base.shape, UnitsConfig())
    plan = tiny.random_plan(structure, UnitsConfig(), {g.name: max(1, g.units // 2) for g in structure.groups})
    small = surgery.cut(base.config, base.weights, structure, plan, models.own_weights(base))
    before = models.checksum(base)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7)
    told.send(models.checksum(base) == before)
    asked.recv()
    with torch.no_grad():
        for parameter in models.dense_model(base).parameters():
            parameter.add_(1)
        for weight in base.weights.values():
            weight.mul_(3)
    told.send(models.checksum(base) != before)
    asked.recv()


def _mapped(folder):
    """Return the kB of this process that lie in the weights' file: resident, and its share of them."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str((folder / "model.safetensors").resolve()))]
    sizes = [dict(line.split(":") for line in lines[i + 1 : i + 9]) for i in starts]
    return [sum(int(size[key].split()[0]) for size in sizes) for key in ("Rss", "Pss")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_lie_in_memory_once_and_a_write_stays_in_its_process(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "wide", hidden_size=240, intermediate_size=1024)
    file = folder / "model.safetensors"
    content, base = file.read_bytes(), models.open_base(folder)
    here = {name: weight.clone() for name, weight in base.weights.items()}
    alone = _mapped(folder)
    assert alone[0] >= len(content) / 1024 * 0.9
    context = multiprocessing.get_context("spawn")
    (asked, ask), (tell, told) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    process = context.Process(target=_write_everywhere, args=(folder, asked, told))
    process.start()
    try:
        assert tell.recv(), "a cut model shares no weight with its base that it may write to"
        shared = _mapped(folder)
        assert shared[0] == alone[0]
        assert shared[1] < 0.6 * alone[1], "another process must read the same pages"
        ask.send("write")
        assert tell.recv()
        assert file.read_bytes() == content
        assert all(torch.equal(weight, here[name]) for name, weight in base.weights.items())
        assert all(torch.equal(w, here[n]) for n, w in models.open_base(folder).weights.items())
        ask.send("end")
    finally:
        process.join(60)
        process.kill()


def test_surplus_tensors_of_old_checkpoints_are_left_out(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, checkpoint / "model.safetensors")
    assert set(models.open_base(checkpoint).weights) == set(models.open_base(checkpoint).shape.shapes)


def test_weights_that_do_not_fit_the_config_are_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing, 1 in all"):
        models.open_base(checkpoint)
    save_file({**tensors, "model.norm.weight": norm[:5].clone()}, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match=r"must be \(24,\), given \(5,\)"):
        models.open_base(checkpoint)


def test_checksum_tells_a_changed_base(checkpoint):
    base = models.open_base(checkpoint)
    before = models.checksum(base)
    assert models.checksum(models.open_base(checkpoint)) == before
    base.weights["model.layers.1.mlp.down_proj.weight"].mul_(1.01)
    assert models.checksum(base) != before
    assert models.checksum(models.open_base(checkpoint)) == before


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FAULTS = [
    (lambda f: (f / "config.json").unlink(), "must be a model folder with config.json"),
    (lambda f: (f / "config.json").write_text("{"), r"config\.json: must be a readable JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    (lambda f: _edit(f / "config.json", model_type="lama"), "'lama' is not supported; did you mean 'llama'"),
    (lambda f: _edit(f / "config.json", auto_map={"AutoModel": "x.Y"}), "brings its own code"),
    (lambda f: _edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "not be quantised, given gptq"),
    (lambda f: (f / "model.safetensors").unlink(), "has neither"),
    (_pickled, "pickle can run code"),
    (lambda f: _cut_short(f / "model.safetensors"), "bytes as its header says"),
    (lambda f: _cut_short(f / "model.safetensors", -7), "model.safetensors"),
    (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "header"),
    (lambda f: (_shard(f) / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors: weight file"),
    (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "tokenizer is missing"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_faulty_folder_is_refused_before_loading(checkpoint, spoil, message):
    spoil(checkpoint)
    if message == "model.safetensors":
        with (checkpoint / "model.safetensors").open("ab") as file:
            file.write(b"surplus")
    with pytest.raises(ModelError, match=message):
        _resolve(checkpoint)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "must be a model folder or a GGUF file"),
        ("nowhere.gguf", "file is missing"),
        ("a b", "must be a hub id"),
        ("package:no_such_package_here", "must be installed"),
        ("package:a.b", "must be installed"),
        ("package:yaml", "must carry one GGUF file, has none"),
    ],
)
def test_unusable_names(name, message):
    with pytest.raises(ModelError, match=message):
        _resolve(name)


def test_hub_id_without_network_says_what_to_do(tmp_path):
    source = _resolve("someone/some-model-1B")
    assert source.kind == "hub"
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        models.fetch_weights(source, tmp_path, torch.float32)
    with pytest.raises(ModelError, match="someone/some-model-1B"):
        models.describe_source(source)


def test_package_is_found_but_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "carries_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    _write_gguf(package / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    source = _resolve("package:carries_a_model")
    assert (source.kind, source.path) == ("gguf", str(package / "tiny.gguf"))
    shutil.copy(package / "tiny.gguf", package / "other.gguf")
    with pytest.raises(ModelError, match=r"other\.gguf, tiny\.gguf"):
        _resolve("package:carries_a_model")


def test_gguf_is_converted_and_opened(tmp_path):
    source = _resolve(_write_gguf(tmp_path / "tiny.gguf"))
    folder = models.fetch_weights(source, tmp_path / "cache", torch.bfloat16)
    base = models.open_base(folder, torch.bfloat16)
    weights = tiny.tiny_weights(tiny.tiny_config())
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(base.weights[name], weights[name].bfloat16())
    assert base.shape == models.describe_source(source)
    assert (base.shape.family, base.shape.kv_heads, base.shape.head_dim) == ("llama", 3, 8)
    assert not hasattr(base.config, "quantization_config")
    assert base.tokenizer.decode(base.tokenizer.encode("xyz")).endswith("xyz")
    assert models.dense_model(base)(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_faulty_gguf_is_refused(tmp_path):
    path = _write_gguf(tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for length in (0, 3, 30, 2000, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"tiny\.gguf.*(whole|truncated)"):
            _resolve(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(ModelError, match="magic"):
        _resolve(path)
    with pytest.raises(ModelError, match="'gpt9' is not supported"):
        _resolve(_write_gguf(tmp_path / "other.gguf", family="gpt9"))
    with pytest.raises(ModelError, match="must carry a tokenizer"):
        _resolve(_write_gguf(tmp_path / "mute.gguf", tokenizer=False))


def test_dtype_by_name_and_by_device(monkeypatch):
    assert models.pick_dtype("float16", "cpu") == torch.float16
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert models.pick_dtype("auto", "cpu") == wanted
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda fast=fast: fast)
        assert models.pick_dtype("auto", torch.device("cuda")) == wanted
