"""A model and its tokenizer from a hub id, a folder, a GGUF file or a Python package.

`resolve` looks (milliseconds), `fetch_weights` brings the weights onto this machine once, in the number format asked
for, `open_base` maps them into memory: every process that opens the same folder shares its pages.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import fcntl
import functools
import gc
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from adasearch import checkpoints
from adasearch.checkpoints import ModelSource
from adasearch.checkpoints import resolve as resolve
from adasearch.documents import fingerprint
from adasearch.errors import ModelError, StorageError
from adasearch.modeling_adasearch import leave_out
from adasearch.pruning.structure import WHOLE, ModelShape, Outline
from adasearch.records import storage_errors

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_SAMPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BaseModel:
    """A dense model, read only: trials copy from it.

    Args:
        folder: checkpoint folder that the weights are mapped from.
        weights: every parameter by full name, tied ones once.
        dtype: number format of the weights.
        outline: what was taken from the model in `folder`, see `outlined.outlined`.
    """

    folder: Path
    config: Any
    tokenizer: Any
    shape: ModelShape
    weights: dict[str, Tensor]
    dtype: torch.dtype
    outline: Outline = WHOLE


def set_threads(threads: int) -> None:
    """Set how many CPU threads this process computes with; operations run one after the other."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        with contextlib.suppress(RuntimeError):  # too late where this process has run operations side by side before
            torch.set_num_interop_threads(1)


def keep_freed_memory() -> None:
    """Let the C library of this process keep what is freed for what is allocated next; `release_memory` gives it back.

    By default it returns the end of the heap to the system after every training step, and each page of it costs a fault
    when it comes back: 34 000 faults and a tenth of the time of a step of 512 tokens on a model of 135 million
    parameters. Blocks that are mapped apart (32 MiB and more) still go back at once. Nothing happens without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)


@functools.cache
def set_libraries_aside() -> None:
    """Let the garbage collector of this process pass over all that lives now, most of it code of libraries, for good.

    A look at the half a million objects of PyTorch, transformers and Optuna takes 0.4 s, and there is one after each
    trial.
    """
    gc.collect()
    gc.freeze()


def limit_gpu_memory(share: float) -> None:
    """Make this process fail with "out of memory" above `share` of its GPU, rather than a neighbour below its own."""
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(share)


def release_memory() -> None:
    """Give unused memory back to the system and the device: between trials, so that peaks do not add up.

    The C library keeps freed blocks of a few MiB, which is what activations and covariances are made of.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_gpu_peak() -> None:
    """Let `gpu_peak` count from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak() -> int:
    """Return the greatest memory that this process's tensors took on its GPU since then (bytes), 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def gpu_sizes() -> tuple[int, ...]:
    """Return the memory of each CUDA device in bytes."""
    return tuple(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))


def pick_device() -> torch.device:
    """Return the device that trials of this process run on: CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the number format called `name`; ``auto`` is bfloat16 where `device` computes with it, else float32."""
    if name != "auto":
        found = getattr(torch, name)
        assert isinstance(found, torch.dtype), name
        return found
    if torch.device(device).type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


@contextlib.contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """Turn what transformers and the hub answer into a `ModelError` that names the model."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        text = str(error).strip().splitlines()
        raise ModelError(f"model {name!r} cannot be read: {text[0] if text else type(error).__name__}") from error


def _download(source: ModelSource) -> Path:
    """Return the folder of a hub model on this machine, downloaded where it is not there yet."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(source.name, revision=source.revision, allow_patterns=_HUB_FILES)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {source.name!r}: the hub gives no such model here ({type(error).__name__}); check the name, the "
            "network, HF_HUB_OFFLINE and your access token, or give model.name a local folder or a GGUF file"
        ) from error
    return Path(folder)


def _gguf_config(path: Path) -> Any:
    """Return a config with the sizes of a GGUF model, from its header alone: transformers' own reader takes seconds."""
    header = checkpoints.check_gguf(path)
    tensors = header.tensors
    embeddings = tensors.get("token_embd.weight", (0, 0))
    names = {
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
    }
    sizes = {name: header.numbers.get(f"{header.family}.{key}") for name, key in names.items()}
    lacking = sorted(name for name, size in sizes.items() if not size) + ([] if all(embeddings) else ["vocab_size"])
    if lacking:
        raise ModelError(f"{path}: must state {lacking[0]} as one number for all layers, states none")
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return transformers.AutoConfig.for_model(
        header.family,
        vocab_size=embeddings[0],
        hidden_size=embeddings[1],
        head_dim=tensors["blk.0.attn_q.weight"][0] // int(sizes["num_attention_heads"] or 1),
        tie_word_embeddings="output.weight" not in tensors,
        **sizes,
        **{name: tensor in tensors for name, tensor in biases.items()},
    )


def read_config(source: ModelSource) -> Any:
    """Return the transformers config of a source, without weights.

    Raises:
        ModelError: it cannot be read or the family is not supported.
    """
    if source.kind == "gguf":
        with _model_errors(source.name):
            return _gguf_config(Path(source.path))
    with _model_errors(source.name):
        place = source.name if source.kind == "hub" else source.path
        config = transformers.AutoConfig.from_pretrained(place, revision=source.revision, trust_remote_code=False)
    checkpoints.check_config(config.to_dict(), source.name)
    return config


def describe_source(source: ModelSource) -> ModelShape:
    """Return the shape of a model from its config alone; of a hub model only ``config.json`` is fetched.

    Raises:
        ModelError: the config cannot be read or the family is not supported.
    """
    return shape_of(read_config(source))


def empty_model(config: Any) -> nn.Module:
    """Return a model without weights (all tensors on the meta device), with a config of its own."""
    build: Any = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"), _model_errors(str(config.model_type)):
        model: nn.Module = build(copy.deepcopy(config))
    leave_out(model, getattr(config, "absent_sublayers", ()))
    return model


def shape_of(config: Any) -> ModelShape:
    """Return the numbers that a model's structure follows from, counted on a model without weights."""
    shapes = {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}
    heads = config.num_attention_heads
    return ModelShape(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        tied="lm_head.weight" not in shapes,
        shapes=shapes,
    )


def assemble(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Return `model`, made by `empty_model`, filled with `weights` themselves (no copy), ready to run, in eval mode.

    Tied weights are tied again, and buffers that no checkpoint holds (rotary frequencies) are computed again.

    Raises:
        ModelError: a weight is missing, unknown or of another shape.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    given = {name: tuple(w.shape) for name, w in weights.items()}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        must, has = wanted.get(wrong[0], "absent"), given.get(wrong[0], "absent")
        raise ModelError(f"weight {wrong[0]} must be {must}, given {has} ({len(wrong)} weights differ in all)")
    model.load_state_dict(dict(weights), strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    first = next(iter(weights.values()))
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(first.device):
                model.set_submodule(name, type(module)(model.config))
    model.config.dtype = first.dtype
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers())), "a tensor was left without content"
    return model.eval()


def dense_model(base: BaseModel) -> nn.Module:
    """Return the dense model over the base weights themselves: for reading only, never train or change it."""
    return assemble(empty_model(base.config), base.weights).requires_grad_(requires_grad=False)


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process dies."""
    with storage_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _sound(folder: Path) -> bool:
    try:
        return bool(checkpoints.check_folder(folder))
    except ModelError:
        return False


def fetch_weights(source: ModelSource, cache: Path, dtype: torch.dtype) -> Path:
    """Return a folder with the model in safetensors of `dtype`, its config and its tokenizer.

    A folder that holds that already is returned itself; anything else is converted once into `cache`, by one process at
    a time, and stands there complete or not at all.

    Raises:
        ModelError: the model cannot be read.
        StorageError: the disk is full or not writable.
    """
    if source.kind == "hub":
        source = ModelSource(kind="folder", name=source.name, path=str(_download(source)))
    path, kind = Path(source.path), str(dtype).removeprefix("torch.")
    if source.kind == "folder":
        shards = checkpoints.check_folder(path)
        if {d for shard in shards for d in shard.dtypes} == {kind}:
            return path
    else:
        checkpoints.check_gguf(path)
    files = [path] if source.kind == "gguf" else [path / "config.json", *sorted(path.glob("*.safetensors"))]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    title = re.sub(r"[^\w.-]+", "-", source.name.rstrip("/").rpartition("/")[2]).strip(".-") or "model"
    target = cache / f"{title}-{fingerprint([str(path), stats])[:12]}-{kind}"
    with _held(cache / f".{target.name}.lock"):
        if not _sound(target):
            _convert_into(source, target, dtype)
            release_memory()  # all weights in float32
    return target


def _convert_into(source: ModelSource, target: Path, dtype: torch.dtype) -> None:
    """Convert in a private folder beside `target`, then put it there; what a killed process left behind is removed."""
    for rest in (target, *target.parent.glob(f".{target.name}.*.tmp")):
        shutil.rmtree(rest, ignore_errors=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    convert = _convert_gguf if source.kind == "gguf" else _convert_folder
    try:
        with storage_errors(target):
            draft.mkdir()
            convert(Path(source.path), draft, dtype)
            for file in draft.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file once the disk has room for them."""
    need = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(path.parent).free
    if free < need:
        raise StorageError(
            f"{path}: the disk must have {need} bytes free, has {free}; free space or set ADASEARCH_CACHE"
        )
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def _convert_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """De-quantise a GGUF file. The marks of quantisation stay behind, as they forbid to save the model."""
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with _model_errors(str(path)):
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config._name_or_path = ""
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {name: _as(p, dtype) for name, p in model.named_parameters()}
    _save(tensors, folder / checkpoints.SINGLE)


def _convert_folder(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy a checkpoint folder with its weights in another number format, one file after the other."""
    for shard in checkpoints.check_folder(path):
        with _model_errors(shard.path):
            tensors = safetensors.torch.load_file(shard.path)
        _save({name: _as(t, dtype) for name, t in tensors.items()}, folder / Path(shard.path).name)
    for file in path.iterdir():
        if file.suffix in {".json", ".model", ".txt", ".jinja"} and file.is_file():
            shutil.copyfile(file, folder / file.name)
    with _model_errors(str(path)):
        config = transformers.AutoConfig.from_pretrained(path)
    config.dtype = dtype
    config.save_pretrained(folder)


def open_base(folder: Path, dtype: torch.dtype | None = None) -> BaseModel:
    """Return the model in a checkpoint folder, its weights mapped into memory and shared with other processes.

    Args:
        folder: what `fetch_weights` returned.
        dtype: number format of the weights; another one than that of the files costs a private copy. None keeps theirs.

    Raises:
        ModelError: a file is missing or damaged, or the weights do not fit the config.
    """
    shards = checkpoints.check_folder(folder)
    with _model_errors(str(folder)):
        config = transformers.AutoConfig.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = {name: t for shard in shards for name, t in safetensors.torch.load_file(shard.path).items()}
    shape = shape_of(config)
    missing = sorted(set(shape.shapes) - set(found))
    if missing:
        raise ModelError(f"{folder}: weight {missing[0]} is missing, {len(missing)} in all; fetch the model again")
    # Left out: copies of tied weights and buffers that old checkpoints carry.
    weights = {name: found[name] if dtype is None else found[name].to(dtype) for name in shape.shapes}
    for name, weight in weights.items():
        if tuple(weight.shape) != shape.shapes[name]:
            raise ModelError(f"{folder}: weight {name} must be {shape.shapes[name]}, given {tuple(weight.shape)}")
    kind = next(iter(weights.values())).dtype
    return BaseModel(folder=folder, config=config, tokenizer=tokenizer, shape=shape, weights=weights, dtype=kind)


def own_weights(base: BaseModel) -> dict[str, Tensor] | None:
    """Return weights equal to those of `base` that the caller may write to; a page takes memory once it is written.

    They are another private mapping of the same files: what is only read stays in memory once per machine. None where
    there is nothing to map: the files hold another number format or more than `base`, or are gone since it was opened.
    """
    if not base.outline.whole:
        return None
    try:
        shards = checkpoints.check_folder(base.folder)
        found = {name: t for shard in shards for name, t in safetensors.torch.load_file(shard.path).items()}
    except (ModelError, OSError, RuntimeError, safetensors.SafetensorError):
        return None  # a cache may be deleted at any time; what is open stays
    same = {name: found[name] for name, w in base.weights.items() if name in found and found[name].dtype == w.dtype}
    return same if len(same) == len(base.weights) else None


def checksum(base: BaseModel) -> str:
    """Return digits that change when the base weights do: of a few numbers of every tensor, in milliseconds."""
    digest = hashlib.sha256()
    for name, weight in sorted(base.weights.items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(name.encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
