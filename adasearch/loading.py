"""Open an exported model, or any model folder of a supported family, without running code that lies in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adasearch.tuning.export import VerifyReport

PREFIX = "adasearch_"
GGUF = "model.gguf"


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: must be a model folder with a readable config.json: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ModelError(f"{folder}/config.json: must be a mapping that names a model_type")
    return data


def _model_class(config: dict[str, Any], folder: Path) -> Any:
    """Return the class that opens a folder: ours for widths per layer, the one of transformers otherwise."""
    family = config["model_type"]
    if not family.startswith(PREFIX):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM
    from adasearch.modeling_adasearch import MODELS

    if family.removeprefix(PREFIX) not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise ModelError(f"{folder}: its family is {family!r}; widths per layer are known for {known}")
    return MODELS[family.removeprefix(PREFIX)]


def load(folder: str | Path, *, dtype: Any = "auto", device: str = "cpu") -> PreTrainedModel:
    """Return the model in `folder`, in evaluation mode.

    Args:
        folder: an export of adasearch, or a folder that transformers can open by itself.
        dtype: a torch dtype, or ``auto`` for that of the file; a GGUF file is read in float32.
        device: where the model goes, such as ``cuda``.

    Raises:
        ModelError: a file is missing, damaged or does not hold the weights that its config promises.
    """
    folder = Path(folder).expanduser()
    if (folder / GGUF).is_file() and not (folder / "config.json").exists():
        from adasearch.tuning.export import _gguf

        opened = _gguf.open_model(folder, device)
        return opened if dtype == "auto" else opened.to(dtype)
    model_class = _model_class(_read_config(folder), folder)
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder}: must hold its weights as .safetensors")
    return open_with(model_class, folder, dtype=dtype, device=device, trust=False)


def open_with(model_class: Any, folder: Path, *, dtype: Any, device: str, trust: bool) -> PreTrainedModel:
    """Return what `model_class` reads from `folder`, every weight accounted for.

    Raises:
        ModelError: it cannot be read, or weights are missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError

    options: dict[str, Any] = {"trust_remote_code": trust, "local_files_only": True, "use_safetensors": True}
    try:
        model, info = model_class.from_pretrained(str(folder), dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be opened: {' '.join(str(error).split())[:500]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise ModelError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:5]}")
    model.to(device).eval()
    return model  # type: ignore[no-any-return]


def verify(folder: str | Path, *, device: str = "cpu", fresh: bool = True) -> VerifyReport:
    """Return what opening an export in a fresh process showed: checksums, shapes, parameters, logits, generation.

    Args:
        folder: an export of adasearch.
        device: where to run the model.
        fresh: open it in a new process; False stays in this one.

    Raises:
        ModelError: `folder` is no export of adasearch.
    """
    from adasearch.tuning.export import _verify

    return _verify.verify(Path(folder).expanduser(), device=device, fresh=fresh)
