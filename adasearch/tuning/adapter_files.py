"""Low-rank updates beside a model, in the files and the format of PEFT: kept before a merge, written, read and merged.

Shape letters: M outputs and K inputs of a projection, R rank of its update b a.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.errors import ModelError
from adasearch.records import write_json
from adasearch.tuning.decoder import Update
from adasearch.tuning.recovery._adapters import merge

FOLDER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """An update as it was before it was merged.

    Args:
        weight: that it belongs to, before the merge, M × K, in the number format of the model.
        a: R × K, float32.
        b: M × R, float32.
        scale: of the update.
        magnitude: length of every row of the merged weight (M, float32), see `lora.Dora`; None without DoRA.
    """

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @staticmethod
    @torch.no_grad()
    def of(module: Any, update: Update) -> Kept | None:
        """Return a copy of an update, without the ranks that add nothing; None where nothing is left of it."""
        a, b = update.a.detach().float(), update.b.detach().float()
        alive = (a != 0).any(1) & (b != 0).any(0)
        if update.gain is None and not bool(alive.any()):
            return None
        if not bool(alive.any()):
            alive[0] = True  # the format knows no update of rank 0
        a, b, weight = a[alive].clone(), b[:, alive].clone(), module.weight.detach().clone()
        lengths = None if update.gain is None else update.gain.float() * _lengths(weight, a, b, update.scale)
        return Kept(weight=weight, a=a, b=b, scale=update.scale, magnitude=lengths)

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Make a weight, which must be that before the merge, what it was after it: rounded once, from float32."""
        gain = None
        if self.magnitude is not None:
            gain = self.magnitude / _lengths(module.weight, self.a, self.b, self.scale)  # type: ignore[arg-type]
        merge(module, Update(self.a, self.b, self.scale, gain=gain))


def _lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the length of every row of weight + scale b a (M, float32)."""
    found: Tensor = torch.linalg.vector_norm(weight.float() + scale * (b @ a), dim=1)
    return found


def config_of(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of updates by module path: ranks and scales of each, modules by full name."""
    ranks = {name: len(found.a) for name, found in kept.items()}
    alphas = {name: found.scale * len(found.a) for name, found in kept.items()}
    first = next(iter(kept))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": list(kept),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(found.magnitude is not None for found in kept.values()),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def write(folder: Path, kept: Mapping[str, Kept]) -> None:
    """Write updates by module path into a new folder, as PEFT's own `save_pretrained` would."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, found in kept.items():
        parts = {"lora_A.weight": found.a, "lora_B.weight": found.b, "lora_magnitude_vector": found.magnitude}
        tensors |= {f"{_PREFIX}{name}.{key}": t.cpu().contiguous() for key, t in parts.items() if t is not None}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config_of(kept))


def merge_into(model: nn.Module, folder: Path) -> None:
    """Merge the updates in a folder that `write` made into a model in place.

    Raises:
        ModelError: the files are damaged, or are for another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS, device=str(next(model.parameters()).device))
        for name in told["target_modules"]:
            own = {key: tensors.get(f"{_PREFIX}{name}.{key}") for key in ("lora_A.weight", "lora_B.weight")}
            a, b = own["lora_A.weight"], own["lora_B.weight"]
            assert a is not None, name
            assert b is not None, name
            module: Any = model.get_submodule(name)
            scale = float(told["alpha_pattern"][name]) / len(a)
            magnitude = tensors.get(f"{_PREFIX}{name}.lora_magnitude_vector")
            Kept(weight=module.weight, a=a, b=b, scale=scale, magnitude=magnitude).apply(module)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelError(f"{folder}: cannot be merged: {' '.join(str(error).split())[:300]}") from error
