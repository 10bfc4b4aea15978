"""GGUF file for llama.cpp and what is built on it: heads and channels per layer as arrays, tokenizer and chat template.

Matrices are stored as `dtype` says, norms and biases in float32. A matrix whose rows are no multiple of 32 numbers
cannot be of q8_0 and is stored in f16. The model that is compared with the file when it is opened again is the
exported one with its weights rounded likewise, so that the comparison is as strict as for other formats; how far
rounding itself moves a logit is stated on the card.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adasearch.documents import value
from adasearch.errors import ModelError
from adasearch.loading import GGUF
from adasearch.pruning import architectures, surgery
from adasearch.pruning.plan import make_plan
from adasearch.registry import EXPORT
from adasearch.sections import UnitsConfig
from adasearch.tuning.export import ExportReport, Goods, ModelCard
from adasearch.tuning.export._files import window
from adasearch.tuning.export._folder import Contents, publish
from adasearch.tuning.export._gguf import FAMILY, NEIGHBOURS, Layout, layout_of, open_model, tensors_of
from adasearch.tuning.export._gguf_tokenizer import GgufTokenizer, gguf_tokenizer
from adasearch.tuning.export._verify import logits_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from adasearch.models import BaseModel

_BLOCK = 32


@value
class GgufOptions:
    """Settings of a GGUF file.

    Args:
        dtype: number format of the matrices.
    """

    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f16"

    @property
    def label(self) -> str:
        """Return what its folder is called after the name of the model."""
        return f"gguf-{self.dtype}"


def _kind(shape: tuple[int, ...], dtype: str) -> Any:
    """Return the number format that a tensor of `shape` is stored in."""
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType["F16" if dtype == "q8_0" and shape[-1] % _BLOCK else dtype.upper()]


def _stored(tensor: Tensor, dtype: str) -> np.ndarray:
    """Return the numbers of a tensor as the file holds them.

    Raises:
        ModelError: a weight is beyond the range of f16.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, quantize

    kind = _kind(tuple(tensor.shape), dtype)
    numbers = tensor.float().cpu().contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and np.abs(numbers).max() > np.finfo(np.float16).max:
        raise ModelError("gguf: weights beyond 65504 do not fit f16; export with dtype bf16 or f32")
    return quantize(numbers, kind)


def rounded(model: nn.Module, dtype: str) -> nn.Module:
    """Return a copy of a model in float32, each weight rounded as the file holds it.

    Rows of heads lie in another order there, which changes nothing: blocks of q8_0 lie within a row.
    """
    import numpy as np
    import torch
    from gguf import dequantize

    copied = copy.deepcopy(model).float().eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            kind = _kind(tuple(parameter.shape), dtype)
            parameter.copy_(torch.from_numpy(np.array(dequantize(_stored(parameter, dtype), kind))))
    return copied


def _unknown_rope(kind: str) -> ModelError:
    return ModelError(
        f"gguf: rotary positions must be default (or llama3 in Llama's graphs), given {kind}; use another format"
    )


def _rope_kind(config: Any) -> str:
    """Return how the positions of a model rotate: ``default`` or ``llama3``; others are refused."""
    kind = str(config.rope_parameters.get("rope_type", "default"))
    if kind not in {"default", "llama3"}:
        raise _unknown_rope(kind)
    return kind


def check(config: Any, tokenizer: Any) -> None:
    """Return when llama.cpp knows the tokenizer and the positions of a dense model.

    Raises:
        ModelError: it does not.
    """
    _rope_kind(config)
    gguf_tokenizer(tokenizer, config.vocab_size)


def _rope_fields(config: Any, writer: Any, layout: Layout) -> dict[str, Tensor]:
    """Write how positions rotate, and return the tensors that llama.cpp wants for it.

    Raises:
        ModelError: a kind of rotation that is not known here.
    """
    import torch

    told, head_dim, kind = dict(config.rope_parameters), layout.head_dim, _rope_kind(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(told["rope_theta"]))
    if kind == "default":
        return {}
    if layout.graph not in NEIGHBOURS:
        raise _unknown_rope(kind)
    # Llama 3.1's stretch of slow frequencies, as transformers computes it: what each is divided by.
    wavelengths = 2 * math.pi * float(told["rope_theta"]) ** (torch.arange(0, head_dim, 2).float() / head_dim)
    low, high, factor = (float(told[x]) for x in ("low_freq_factor", "high_freq_factor", "factor"))
    turns = float(told["original_max_position_embeddings"]) / wavelengths
    part = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return {"rope_freqs.weight": 1.0 / (part + (1.0 - part) / factor)}


def _write_model_fields(writer: Any, goods: Goods, layout: Layout, dtype: str) -> dict[str, Tensor]:
    """Write sizes and settings; return the extra tensors that they ask for."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config, card = goods.base.config, goods.card
    types = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(card.model.rpartition("/")[2] or "model")
    if card.licence:
        writer.add_license(card.licence)
    writer.add_string(FAMILY, goods.plan.family)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(LlamaFileType[types[dtype]])
    writer.add_vocab_size(goods.base.shape.vocabulary)
    # llama.cpp looks back on everything with these graphs: beyond the window it would be another model.
    writer.add_context_length(min(filter(None, (config.max_position_embeddings, window(config)))))
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(layout.widths))
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.groups)
    writer.add_feed_forward_length(layout.channels)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    return _rope_fields(config, writer, layout)


def _write_tokenizer(writer: Any, found: GgufTokenizer) -> None:
    writer.add_tokenizer_model(found.model)
    if found.tokens:
        writer.add_token_list(found.tokens)
        writer.add_token_types(found.kinds)
    if found.split:
        writer.add_tokenizer_pre(found.split)
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
    for name, number in found.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    if found.adds:
        writer.add_add_bos_token(found.adds["bos"])
        writer.add_add_eos_token(found.adds["eos"])
    if "space_prefix" in found.adds:
        writer.add_add_space_prefix(found.adds["space_prefix"])
    if found.template:
        writer.add_chat_template(found.template)


def _announce(writer: Any, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Tell the writer of a tensor before its numbers come: one after the other, so that none waits in memory."""
    import numpy as np
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    kind = _kind(shape, dtype)
    plain: dict[Any, np.dtype[Any]] = {
        GGMLQuantizationType.F32: np.dtype(np.float32),
        GGMLQuantizationType.F16: np.dtype(np.float16),
    }
    if kind in plain:
        writer.add_tensor_info(name, shape, plain[kind], math.prod(shape) * plain[kind].itemsize)
    else:
        bytes_ = quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, bytes_, np.dtype(np.uint8), math.prod(bytes_), raw_dtype=kind)


def _write_file(path: Path, goods: Goods, layout: Layout, dtype: str) -> int:
    """Write the file and return the number of parameters in it."""
    from gguf import GGUFWriter

    writer: Any = GGUFWriter(path, layout.graph)
    try:
        extra = _write_model_fields(writer, goods, layout, dtype)
        _write_tokenizer(writer, gguf_tokenizer(goods.base.tokenizer, goods.base.shape.vocabulary))

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from extra.items()
            yield from tensors_of(goods.model, layout)

        sizes = {name: tuple(tensor.shape) for name, tensor in tensors()}
        for name, shape in sizes.items():
            _announce(writer, name, shape, dtype)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, tensor in tensors():
            writer.write_tensor_data(_stored(tensor, dtype))
        writer.flush()
    finally:
        writer.close()
    return sum(math.prod(shape) for name, shape in sizes.items() if name not in extra)


def write_dense(base: BaseModel, path: Path, options: GgufOptions) -> None:
    """Write a model that nothing was cut from: what an export is timed beside.

    Raises:
        ModelError: llama.cpp has no graph for the model or does not know its tokenizer.
    """
    units = UnitsConfig()
    structure = architectures.describe(base.shape, units)
    plan = make_plan(structure, units, {}, {})
    model = surgery.cut(base.config, base.weights, structure, plan)
    goods = Goods(model=model, base=base, structure=structure, plan=plan, card=ModelCard(model="dense"))
    _write_file(path, goods, layout_of(goods), options.dtype)


def _notes(goods: Goods, layout: Layout, moved: float, padding: int, options: GgufOptions) -> tuple[str, ...]:
    bound = window(goods.base.config)
    notes = [
        f"Stored as {options.dtype} for llama.cpp's graph `{layout.graph}`; rounding moves a logit by {moved:.3g} "
        "at most on the prompts of `adasearch verify`."
    ]
    if padding:
        notes.append(f"{padding:,} zeros stand where sublayers are gone that llama.cpp cannot leave out.")
    if bound is not None:
        notes.append(f"Its context is {bound:,} tokens: the model looks back no further, llama.cpp always does.")
    return tuple(notes)


@EXPORT.register(options=GgufOptions, open=open_model, check=check)
def export(goods: Goods, folder: Path, options: GgufOptions, *, overwrite: bool = False) -> ExportReport:
    """Write a pruned model as a GGUF file.

    Raises:
        ModelError: llama.cpp has no graph for the model or does not know its tokenizer, or as `publish`.
        StorageError: as `publish`.
    """
    layout = layout_of(goods)

    def write(draft: Path) -> Contents:
        parameters = _write_file(draft / GGUF, goods, layout, options.dtype)
        as_read = rounded(goods.model, options.dtype)
        moved = float((logits_of(as_read) - logits_of(goods.model)).abs().max())
        notes = _notes(goods, layout, moved, parameters - goods.plan.parameters, options)
        return Contents(layout="gguf", as_read=as_read, parameters=parameters, dtype=options.dtype, notes=notes)

    return publish(goods, folder, "gguf", write, overwrite=overwrite)
