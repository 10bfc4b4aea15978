"""The files of a Hugging Face folder that every format of that kind shares, and how wide the layers of a model are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from adasearch.documents import value
from adasearch.outlined import generation_config
from adasearch.records import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from adasearch.models import BaseModel

FileSize = Annotated[str, pydantic.Field(pattern=r"^[1-9][0-9]{0,5}(KB|MB|GB)$")]


@value
class LayerWidths:
    """How wide a layer is: KV groups, query heads of each, MLP channels; 0 of them where a sublayer is gone."""

    groups: int
    repeats: int
    channels: int

    def as_config(self) -> dict[str, int]:
        """Return this in the words of a config; what is said of sublayers that are gone is never used."""
        groups, channels = max(1, self.groups), max(1, self.channels)
        heads = groups * max(1, self.repeats)
        return {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": channels}


def layer_widths(model: Any, head_dim: int) -> list[LayerWidths]:
    """Return how wide each layer of a model is.

    Args:
        model: causal language model in the layout of transformers, cut or not.
        head_dim: rows of one head.
    """

    def widths(layer: Any) -> LayerWidths:
        attention, mlp = layer.self_attn, layer.mlp
        groups = heads = 0
        if not hasattr(attention, "absent"):
            heads, groups = (x.out_features // head_dim for x in (attention.q_proj, attention.k_proj))
        channels = 0 if hasattr(mlp, "absent") else mlp.gate_proj.out_features
        return LayerWidths(groups=groups, repeats=heads // max(1, groups), channels=channels)

    return [widths(layer) for layer in model.model.layers]


def window(config: Any) -> int | None:
    """Return the tokens that attention looks back on in some layer, None without such a limit."""
    kinds = set(getattr(config, "layer_types", None) or ())
    used = getattr(config, "use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return getattr(config, "sliding_window", None) if used else None


def accepted(config_class: Any, data: Mapping[str, Any]) -> Any | None:
    """Return the config that `data` describes, None where its class refuses it.

    Llama refuses a number of heads that does not divide the hidden size.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class.from_dict(dict(data))
    except (StrictDataclassError, ValueError):
        return None


def write_weights(state: Mapping[str, Tensor], draft: Path, shard: str, *, tied: bool) -> None:
    """Write tensors as safetensors, over several files with an index where one would be larger than `shard`.

    Args:
        state: by name, tied ones under both names.
        draft: folder to write to.
        shard: greatest size of a file.
        tied: the output layer is the embedding: the config says so, and it is stored once.
    """
    from huggingface_hub import save_torch_state_dict

    stored = {n: t.detach().contiguous() for n, t in state.items() if not (tied and n == "lm_head.weight")}
    save_torch_state_dict(stored, draft, max_shard_size=shard, metadata={"format": "pt"})


def write_text_files(config: Any, base: BaseModel, draft: Path) -> None:
    """Write config, generation settings and tokenizer."""
    config.save_pretrained(draft)
    if generation := generation_config(base):
        write_json(draft / "generation_config.json", generation)
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(draft)
