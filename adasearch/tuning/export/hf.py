"""Hugging Face folder: safetensors, config and tokenizer that `AutoModelForCausalLM.from_pretrained` opens.

Where every layer has the same widths and no bias was added, the config is the stock one of the family. Otherwise
``modeling_adasearch.py`` is shipped with it, under a model type of its own: opening the folder without that file (or
without adasearch) is then an error and never a wrong model. Weights above `shard` are split over several files, with
the index that transformers reads.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from adasearch import loading, modeling_adasearch
from adasearch.documents import value
from adasearch.errors import ModelError
from adasearch.registry import EXPORT
from adasearch.tuning import adapter_files
from adasearch.tuning.export import ExportReport, Goods
from adasearch.tuning.export._files import FileSize, accepted, layer_widths, write_text_files, write_weights
from adasearch.tuning.export._folder import Contents, publish
from adasearch.tuning.export._verify import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adasearch.models import BaseModel
    from adasearch.tuning.adapter_files import Kept

_BESIDE = """The weights in this folder are those **before** the fine-tune; its low-rank updates lie in `adapter/`, in
PEFT's format. `adasearch.load` opens both and merges them. With PEFT, once the model is loaded as below:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/folder/adapter")  # model.merge_and_unload() merges
```"""
_LAYER_BIAS = re.compile(r"(?P<module>.*\.layers\.\d+\..*)\.bias")


@value
class HfOptions:
    """Settings of a Hugging Face folder.

    Args:
        shard: greatest size of a weight file, such as ``500MB``.
        adapters: ``merged`` into the weights, or ``beside`` them: the model as it was before its recovery, and the
            low-rank updates in ``adapter/``, in PEFT's format.
    """

    shard: FileSize = "5GB"
    adapters: Literal["merged", "beside"] = "merged"

    @property
    def label(self) -> str:
        """Return what its folder is called after the name of the model: nothing for the usual form."""
        return "" if self.adapters == "merged" else "adapters"


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

    model = loading.open_with(AutoModelForCausalLM, folder, dtype="auto", device=device, trust=True)
    loading.merge_adapter(model, folder)
    return model


@EXPORT.register(options=HfOptions, open=open_model)
def export(goods: Goods, folder: Path, options: HfOptions, *, overwrite: bool = False) -> ExportReport:
    """Write a pruned model as a Hugging Face folder; arguments and further errors are those of `publish`.

    Raises:
        ModelError: adapters shall lie beside the model, and no recovery left any.
    """
    beside = goods.beside if options.adapters == "beside" else {}
    if options.adapters == "beside" and not beside:
        raise ModelError("hf: adapters can lie beside a model whose recovery trained some; this one has none")

    def write(draft: Path) -> Contents:
        config, layout = _config(goods)
        state = goods.model.state_dict() | {f"{name}.weight": kept.weight for name, kept in beside.items()}
        write_weights(state, draft, options.shard, tied=goods.base.shape.tied)
        write_text_files(config, goods.base, draft)
        if layout == "per_layer":
            shutil.copyfile(modeling_adasearch.__file__, draft / modeling_adasearch.FILE_NAME)
        if not beside:
            return Contents(layout=layout, as_read=goods.model)
        adapter_files.write(draft / adapter_files.FOLDER, beside)
        return Contents(layout=layout, as_read=_as_read(goods.model, beside), notes=(_BESIDE,))

    return publish(goods, folder, "hf", write, overwrite=overwrite)


def _as_read(model: Any, beside: Mapping[str, Kept]) -> Any:
    """Return a copy of the model that was merged as a reader merges it: a row's length divides in another order."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in beside.items():
            module = copied.get_submodule(name)
            module.weight.copy_(kept.weight)
            kept.apply(module)
    return copied
