"""Hugging Face folder: safetensors, config and tokenizer that `AutoModelForCausalLM.from_pretrained` opens.

Where every layer has the same widths and no bias was added, the config is the stock one of the family. Otherwise
``modeling_adasearch.py`` is shipped with it, under a model type of its own: opening the folder without that file (or
without adasearch) is then an error and never a wrong model.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import tempfile
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import ModelError, StorageError
from adasearch.outlined import generation_config
from adasearch.records import storage_errors, write_atomically, write_json
from adasearch.registry import EXPORT
from adasearch.tuning.export import MARKER, SUMS, ExportReport, ModelCard, VerifyReport
from adasearch.tuning.export._card import model_card
from adasearch.tuning.export._verify import logits_of, sample_of, sha256, verify

if TYPE_CHECKING:
    from torch import nn

    from adasearch.models import BaseModel
    from adasearch.pruning.plan import PruningPlan
    from adasearch.pruning.structure import ModelStructure

SHARD = "5GB"
_LAYER_BIAS = re.compile(r"(?P<module>.*\.layers\.\d+\..*)\.bias")


def _is_ours(folder: Path) -> bool:
    return (folder / MARKER).is_file() and (folder / SUMS).is_file()


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier export that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StorageError(f"{folder}: must be a folder or not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not _is_ours(folder):
        raise StorageError(
            f"{folder}: must be empty, it holds files that are no export of adasearch; give another folder"
        )
    if not overwrite:
        raise StorageError(f"{folder}: holds an earlier export; ask for overwriting or give another folder")


def _check_cut(model: nn.Module, structure: ModelStructure, plan: PruningPlan) -> None:
    """Check that every cut parameter of `model` has the size that `plan` says."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in structure.groups:
        kept = len(plan.keep[group.name])
        for part in group.slices:
            size = parameters[part.parameter].shape[part.dim]
            if size != kept * part.block:
                raise ModelError(
                    f"{part.parameter}: dimension {part.dim} must be {kept * part.block} by the plan, given {size}"
                )
    total = sum(p.numel() for p in model.parameters())
    if total != plan.parameters:
        raise ModelError(f"the model has {total:,} parameters, the plan promises {plan.parameters:,}")


def _layer_widths(model: Any, head_dim: int) -> list[dict[str, int]]:
    """Return how wide each layer is, in the words of a config; what is said of absent sublayers is never used."""

    def widths(layer: Any) -> dict[str, int]:
        attention, mlp = layer.self_attn, layer.mlp
        heads = (1, 1) if hasattr(attention, "absent") else (attention.q_proj, attention.k_proj)
        q, k = (x if isinstance(x, int) else x.out_features // head_dim for x in heads)
        wide = 1 if hasattr(mlp, "absent") else mlp.gate_proj.out_features
        return {"num_attention_heads": q, "num_key_value_heads": k, "intermediate_size": wide}

    return [widths(layer) for layer in model.model.layers]


def _stock_config(base: BaseModel, widths: dict[str, int], dtype: str) -> Any | None:
    """Return the family's own config at `widths`, None when the family does not accept them."""
    from huggingface_hub.errors import StrictDataclassError

    data = {**base.config.to_dict(), **widths, "head_dim": base.shape.head_dim, "dtype": dtype}
    try:
        return type(base.config).from_dict(data)
    except (StrictDataclassError, ValueError):
        return None  # Llama refuses a number of heads that does not divide the hidden size


def _per_layer_config(base: BaseModel, widths: list[dict[str, int]], biases: tuple[str, ...], dtype: str) -> Any:
    """Return our config of the family: dense widths as the global values, the real ones per layer."""
    from adasearch.modeling_adasearch import FILE_NAME, MODELS

    if base.shape.family not in MODELS:
        raise ModelError(f"widths per layer can be exported for {', '.join(MODELS)}, given {base.shape.family}")
    model_class: Any = MODELS[base.shape.family]
    module = Path(FILE_NAME).stem
    names = {"AutoConfig": model_class.config_class.__name__, "AutoModelForCausalLM": model_class.__name__}
    data = {key: item for key, item in base.config.to_dict().items() if key not in {"model_type", "auto_map"}}
    data |= {
        "head_dim": base.shape.head_dim,
        "dtype": dtype,
        "architectures": [model_class.__name__],
        "auto_map": {key: f"{module}.{name}" for key, name in names.items()},
        "extra_biases": list(biases),
        "per_layer_config": dict(enumerate(widths)),
    }
    return model_class.config_class.from_dict(data)


def _config(model: Any, base: BaseModel) -> tuple[Any, str]:
    """Return the config to write, and its layout."""
    widths = _layer_widths(model, base.shape.head_dim)
    found = (_LAYER_BIAS.fullmatch(name) for name in model.state_dict())
    biases = tuple(m["module"] for m in found if m and m.string not in base.shape.shapes)
    dtype = str(model.dtype).removeprefix("torch.")
    whole = not biases and not getattr(base.config, "absent_sublayers", ())
    uniform = whole and all(layer == widths[0] for layer in widths)
    stock = _stock_config(base, widths[0], dtype) if uniform else None
    return (stock, "stock") if stock is not None else (_per_layer_config(base, widths, biases, dtype), "per_layer")


def _write_weights(model: Any, draft: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.lm_head.weight is model.model.embed_tokens.weight:
        del state["lm_head.weight"]  # tied: the config says so, and it is stored once
    save_torch_state_dict(state, draft, max_shard_size=SHARD, metadata={"format": "pt"})


def _write_text_files(model: Any, base: BaseModel, draft: Path) -> str:
    """Write config, generation settings, tokenizer and the modelling file where it is needed; return the layout."""
    config, layout = _config(model, base)
    config.save_pretrained(draft)
    if layout == "per_layer":
        from adasearch import modeling_adasearch

        shutil.copyfile(modeling_adasearch.__file__, draft / modeling_adasearch.FILE_NAME)
    if generation := generation_config(base):
        write_json(draft / "generation_config.json", generation)
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(draft)
    return layout


def _seal(draft: Path) -> int:
    """Write the checksum of every file, bring all of them to the disk, and return their size in bytes."""
    paths = sorted(p for p in draft.iterdir() if p.is_file())
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_atomically(draft / SUMS, "".join(f"{sha256(path)}  {path.name}\n" for path in paths).encode())
    return sum(path.stat().st_size for path in paths)


def _marker(model: Any, plan: PruningPlan, layout: str, logits: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "format": "hf",
        "layout": layout,
        "family": plan.family,
        "parameters": plan.parameters,
        "dense_parameters": plan.dense_parameters,
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits": sample_of(logits),
        "versions": {
            name: metadata.version(name) for name in ("adasearch", "torch", "transformers") if _installed(name)
        },
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _verified(draft: Path, logits: Any, device: str) -> VerifyReport:
    """Open the draft in a fresh process and compare it with the logits of the model in memory."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as room:
        reference = Path(room) / "logits.safetensors"
        save_file({"logits": logits}, reference)
        return verify(draft, reference=reference, device=device)


def _place(draft: Path, folder: Path) -> None:
    """Give the draft its name; an earlier export steps aside first and goes when the new one stands."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    if folder.exists():
        folder.rename(aside)
    draft.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


@EXPORT.register()
def export(  # noqa: PLR0913 - the seam that all formats share
    model: nn.Module,
    base: BaseModel,
    structure: ModelStructure,
    plan: PruningPlan,
    folder: Path,
    card: ModelCard,
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Write a pruned model as a Hugging Face folder, and open it in a fresh process before it gets its name.

    Args:
        model: the pruned (and recovered) model.
        base: the model it came from; config and tokenizer are taken from it.
        structure: groups of the base model.
        plan: what was cut.
        folder: where to write.
        card: what the model card tells.
        overwrite: replace an earlier export in `folder`.

    Raises:
        StorageError: `folder` holds something else, or the disk refuses.
        ModelError: the model does not match its plan, or what was written does not open as the same model.
    """
    folder = Path(folder)
    _check_target(folder, overwrite=overwrite)
    _check_cut(model, structure, plan)
    logits = logits_of(model)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with storage_errors(folder):
            draft.mkdir(parents=True)
            _write_weights(model, draft)
            layout = _write_text_files(model, base, draft)
            plan.save(draft / "plan.json")
            write_json(draft / MARKER, _marker(model, plan, layout, logits))
            figures = {"parameters": plan.parameters, "dense_parameters": plan.dense_parameters}
            text = model_card(card, title=folder.name, layout=layout, **figures)
            write_atomically(draft / "README.md", text.encode())
            size = _seal(draft)
            report = _verified(draft, logits, next(model.parameters()).device.type)
            if not report.sound:
                raise ModelError(
                    f"{folder}: not written, since what was written is not the model: {'; '.join(report.problems)}"
                )
            _place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    report = dataclasses.replace(report, folder=str(folder))
    return ExportReport(
        folder=str(folder), format="hf", layout=layout, parameters=plan.parameters, size=size, verified=report
    )
