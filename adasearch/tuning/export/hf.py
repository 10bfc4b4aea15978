"""Hugging Face folder: safetensors, config and tokenizer that `AutoModelForCausalLM.from_pretrained` opens.

Where every layer has the same widths and no bias was added, the config is the stock one of the family. Otherwise
``modeling_adasearch.py`` is shipped with it, under a model type of its own: opening the folder without that file (or
without adasearch) is then an error and never a wrong model. Weights above `shard` are split over several files, with
the index that transformers reads.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch import loading, modeling_adasearch
from adasearch.documents import value
from adasearch.errors import ModelError
from adasearch.registry import EXPORT
from adasearch.tuning.export import ExportReport, Goods
from adasearch.tuning.export._files import FileSize, accepted, layer_widths, write_text_files, write_weights
from adasearch.tuning.export._folder import Contents, publish
from adasearch.tuning.export._verify import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adasearch.models import BaseModel

_LAYER_BIAS = re.compile(r"(?P<module>.*\.layers\.\d+\..*)\.bias")


@value
class HfOptions:
    """Settings of a Hugging Face folder.

    Args:
        shard: greatest size of a weight file, such as ``500MB``.
    """

    shard: FileSize = "5GB"

    @property
    def label(self) -> str:
        """Return what its folder is called after the name of the model: nothing, it is the usual form."""
        return ""


def _stock_config(base: BaseModel, widths: dict[str, int], dtype: str) -> Any | None:
    """Return the family's own config at `widths`, None when the family does not accept them."""
    data = {**base.config.to_dict(), **widths, "head_dim": base.shape.head_dim, "dtype": dtype}
    return accepted(type(base.config), data)


def _per_layer_config(base: BaseModel, widths: list[dict[str, int]], biases: tuple[str, ...], dtype: str) -> Any:
    """Return our config of the family: dense widths as the global values, the real ones per layer."""
    known = modeling_adasearch.MODELS
    if base.shape.family not in known:
        raise ModelError(f"widths per layer can be exported for {', '.join(known)}, given {base.shape.family}")
    model_class: Any = known[base.shape.family]
    module = Path(modeling_adasearch.FILE_NAME).stem
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


def _config(goods: Goods) -> tuple[Any, str]:
    """Return the config to write, and its layout."""
    model, base = goods.model, goods.base
    widths = [layer.as_config() for layer in layer_widths(model, base.shape.head_dim)]
    found = (_LAYER_BIAS.fullmatch(name) for name in model.state_dict())
    biases = tuple(m["module"] for m in found if m and m.string not in base.shape.shapes)
    whole = not biases and not getattr(base.config, "absent_sublayers", ())
    uniform = whole and all(layer == widths[0] for layer in widths)
    stock = _stock_config(base, widths[0], goods.dtype) if uniform else None
    if stock is not None:
        return stock, "stock"
    return _per_layer_config(base, widths, biases, goods.dtype), "per_layer"


def open_model(folder: Path, device: str) -> PreTrainedModel:
    """Open `folder` as a user does; the modelling file in it is run only when it is, byte for byte, our own."""
    shipped = folder / modeling_adasearch.FILE_NAME
    if not shipped.exists() or sha256(shipped) != sha256(Path(modeling_adasearch.__file__)):
        return loading.load(folder, device=device)
    from transformers import AutoModelForCausalLM

    return loading.open_with(AutoModelForCausalLM, folder, dtype="auto", device=device, trust=True)


@EXPORT.register(options=HfOptions, open=open_model)
def export(goods: Goods, folder: Path, options: HfOptions, *, overwrite: bool = False) -> ExportReport:
    """Write a pruned model as a Hugging Face folder; arguments and errors are those of `publish`."""

    def write(draft: Path) -> Contents:
        config, layout = _config(goods)
        write_weights(goods.model.state_dict(), draft, options.shard, tied=goods.base.shape.tied)
        write_text_files(config, goods.base, draft)
        if layout == "per_layer":
            shutil.copyfile(modeling_adasearch.__file__, draft / modeling_adasearch.FILE_NAME)
        return Contents(layout=layout, as_read=goods.model)

    return publish(goods, folder, "hf", write, overwrite=overwrite)
