"""What lies on disk under the name of a model, checked in milliseconds; loads no weight and runs no foreign code."""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, Literal

from adasearch.documents import value
from adasearch.errors import ModelError
from adasearch.registry import ARCHITECTURES, nearest
from adasearch.sections import ModelConfig

_HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?$")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_HEADER_LIMIT = 100 << 20
# GGUF value types: number of bytes of the fixed ones; 8 is a string, 9 an array.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_ALIGNMENT = 32


@value
class ModelSource:
    """Where a model comes from: `path` is a folder, a GGUF file, or empty for a hub id, which is `name`."""

    kind: Literal["hub", "folder", "gguf"]
    name: str
    path: str = ""
    revision: str | None = None


@value
class Shard:
    """One safetensors file: shape of every tensor by name, and the float types it holds (``bfloat16``...)."""

    path: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: tuple[str, ...]


@value
class GgufHeader:
    """What a GGUF file says of itself: whole numbers of its metadata by key, and the shape of every tensor by name.

    `template` tells whether its tokenizer has a chat template.
    """

    family: str
    numbers: dict[str, int]
    tensors: dict[str, tuple[int, ...]]
    template: bool = False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: must be a readable JSON file: {error}; fetch the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: must hold a JSON object, given {type(data).__name__}")
    return data


def check_shard(path: Path) -> Shard:
    """Return what a safetensors file holds, from its header.

    Raises:
        ModelError: the file is missing, is no safetensors file or is shorter or longer than its header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 2 <= length <= min(size - 8, _HEADER_LIMIT) else None
    except FileNotFoundError:
        raise ModelError(f"{path}: weight file is missing; fetch the model again") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: must be a readable safetensors file: {error}; fetch the model again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: header of {length} bytes does not fit a file of {size} bytes; fetch the model again")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise ModelError(f"{path}: must have {end} bytes as its header says, has {size}; fetch the model again")
    kinds = {_FLOATS.get(entry["dtype"], entry["dtype"]) for entry in entries.values()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    return Shard(path=str(path), shapes=shapes, dtypes=tuple(sorted(kinds)))


def check_family(family: Any, where: str) -> None:
    """Return when models of this family can be cut.

    Raises:
        ModelError: they cannot; the message names the families that can.
    """
    known = ARCHITECTURES.names()
    if family not in known:
        raise ModelError(f"{where}: model family {family!r} is not supported; {nearest(str(family), known)}")


def check_config(data: dict[str, Any], where: str) -> None:
    """Return when a ``config.json`` describes a model that can be cut: known family, plain weights, no code of its own.

    Raises:
        ModelError: it does not, and what to do.
    """
    if data.get("auto_map"):
        raise ModelError(
            f"{where}: the model brings its own code (auto_map), which is never run; use a stock checkpoint"
        )
    check_family(data.get("model_type"), where)
    if data.get("quantization_config"):
        method = data["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{where}: weights must not be quantised, given {method}; use the checkpoint that it was made from"
        )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint folder, those of its index where it is sharded."""
    if (folder / INDEX).is_file():
        shards = _read_json(folder / INDEX).get("weight_map", {})
        return tuple(folder / name for name in sorted(set(shards.values())))
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder / pickles[0]}: weights must be safetensors; a pickle can run code when opened and is never read: "
            "convert it with save_pretrained in an environment that you trust"
        )
    raise ModelError(f"{folder}: must hold {SINGLE} or {INDEX}, has neither; fetch the model again")


def check_folder(folder: Path) -> tuple[Shard, ...]:
    """Return the weight files of a checkpoint folder once everything that a run needs is there and whole.

    Raises:
        ModelError: the file that is missing, damaged or not supported, and what to do.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: must be a model folder with config.json, safetensors weights and a tokenizer")
    check_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    shards = tuple(check_shard(path) for path in _weight_files(folder))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{folder}: tokenizer is missing, none of {', '.join(TOKENIZERS)}; copy it beside config.json")
    return shards


class _Cursor:
    """A place in a GGUF file that moves on with every value read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return found

    def text(self) -> str:
        (length,) = self.take("<Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8", errors="replace")

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner, count = self.take("<IQ")
            if inner in _WIDTHS:
                self.at += _WIDTHS[inner] * count
            else:
                for _ in range(count):
                    self.skip(inner)
        else:
            self.at += _WIDTHS[kind]


def _gguf_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """Return the strings and 32-bit numbers of the metadata (None for other values), and the number of tensors."""
    magic, version, tensors, values = cursor.take("<4sIQQ")
    if magic != b"GGUF" or version not in {2, 3}:
        raise ValueError(f"magic {magic!r}, version {version}; must be GGUF of version 2 or 3")
    metadata: dict[str, Any] = {}
    for _ in range(values):
        name = cursor.text()
        (kind,) = cursor.take("<I")
        start = cursor.at
        if kind == _STRING:
            metadata[name] = cursor.text()
            continue
        cursor.skip(kind)
        metadata[name] = struct.unpack_from("<I", cursor.data, start)[0] if kind == _UINT32 else None
    return metadata, tensors


def _gguf_tensors(cursor: _Cursor, tensors: int, alignment: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return the shapes of the tensors, and the number of bytes that a GGUF file must have to hold them."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    ends = [0]
    shapes: dict[str, tuple[int, ...]] = {}
    for _ in range(tensors):
        name = cursor.text()
        (dims,) = cursor.take("<I")
        *shape, kind, offset = cursor.take(f"<{dims}QIQ")
        block, width = sizes.get(kind, (1, 0))
        ends.append(offset + math.prod(shape) // block * width)
        shapes[name] = tuple(reversed(shape))
    return shapes, -(-cursor.at // alignment) * alignment + max(ends)


def check_gguf(path: Path) -> GgufHeader:
    """Return the header of a GGUF file once the file is known to be whole and of a supported family.

    Raises:
        ModelError: the file is missing, damaged, truncated, without tokenizer or of a family that is not supported.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            metadata, tensors = _gguf_metadata(cursor)
            shapes, end = _gguf_tensors(cursor, tensors, metadata.get("general.alignment") or _ALIGNMENT)
            size = len(data)
    except FileNotFoundError:
        raise ModelError(f"{path}: file is missing; check model.name") from None
    except (OSError, ValueError, struct.error, KeyError, OverflowError) as error:
        raise ModelError(f"{path}: must be a whole GGUF file: {error}; fetch the file again") from error
    if size < end:
        raise ModelError(
            f"{path}: is truncated: must have {end} bytes as its header says, has {size}; fetch the file again"
        )
    family = metadata.get("general.architecture")
    check_family(family, str(path))
    if "tokenizer.ggml.model" not in metadata:
        raise ModelError(f"{path}: must carry a tokenizer (tokenizer.ggml.model), has none; use another conversion")
    numbers = {name: number for name, number in metadata.items() if isinstance(number, int)}
    template = bool(metadata.get("tokenizer.chat_template"))
    return GgufHeader(family=str(family), numbers=numbers, tensors=shapes, template=template)


def has_chat_template(source: ModelSource) -> bool | None:
    """Return whether the tokenizer of a model has a chat template, None for a hub's, which is not here yet.

    Raises:
        ModelError: a file cannot be read.
    """
    if source.kind == "hub":
        return None
    path = Path(source.path)
    if source.kind == "gguf":
        return check_gguf(path).template
    if any((path / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    settings = path / "tokenizer_config.json"
    return settings.is_file() and bool(_read_json(settings).get("chat_template"))


def _package_path(name: str, where: str) -> Path:
    """Return the GGUF file or model folder inside a Python package, found without importing the package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{where}: package {name!r} must be installed in this environment; install it with pip")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if (folder / "config.json").is_file():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise ModelError(f"{where}: package {name!r} must carry one GGUF file, has {found}; name the file itself")
    return files[0]


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or Path(name).exists()


def resolve(model: ModelConfig, where: str = "model.name") -> ModelSource:
    """Return where a model comes from, once what lies on this machine is checked; loads no weights.

    Args:
        model: section `model` of a study.
        where: key of the name, for messages.

    Raises:
        ModelError: a file is missing, damaged or truncated, the family is not supported, the weights are quantised or
            pickled, or the tokenizer is missing.
    """
    name = model.name
    if not name.startswith("package:") and not _looks_local(name):
        if not _HUB_ID.match(name):
            raise ModelError(f"{where}: must be a hub id, a folder, a GGUF file or package:NAME, given {name!r}")
        return ModelSource(kind="hub", name=name, revision=model.revision)
    local = name.startswith("package:")
    path = _package_path(name.removeprefix("package:"), where) if local else Path(name).expanduser().resolve()
    if path.is_dir():
        check_folder(path)
        return ModelSource(kind="folder", name=name, path=str(path))
    if path.suffix != ".gguf":
        raise ModelError(f"{where}: {path} must be a model folder or a GGUF file; check the path")
    check_gguf(path)
    return ModelSource(kind="gguf", name=name, path=str(path))
