"""The decoder of the supported families as a function of its weights: for scoring and for training low-rank updates.

It reads the modules of transformers' own model, shares their weights and gives their hidden states; what it leaves out
is the price of generality: a node of autograd for every small operation, masks and caches built anew, separate
adapters around every projection. `takes` says for which models it stands; others run through transformers.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from adasearch.tuning import attention, kernels
from adasearch.tuning.attention import Layout
from adasearch.tuning.kernels import Projection, Rotation

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_PLAIN_LENGTH = 512
"""Longest sequence whose attention trains faster by plain products than fused, on a CPU (measured)."""


_RECOMPUTES: contextvars.ContextVar[bool] = contextvars.ContextVar("recomputes", default=False)


class Update(NamedTuple):
    """A low-rank update of one linear layer, y = gain * (z weight^T + scale * drop(z) a^T b^T) + bias, z = gate * x.

    Args:
        a: R × inputs.
        b: outputs × R.
        scale: of the update.
        dropout: share of the inputs that is dropped.
        gain: factor of each output, None for 1.
        gate: factor of each input, None for 1; of projections that write to the residual stream, and of the columns of
            the embedding.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    gain: Tensor | None = None
    gate: Tensor | None = None


Updates = Mapping[nn.Module, Update]


def takes(model: Any) -> bool:
    """Return whether `hidden_states` stands for `model`."""
    return model.config.model_type in FAMILIES and model.config.hidden_act == "silu"


def _projection(module: Any, updates: Updates) -> Projection:
    found = updates.get(module)
    if found is None:
        return Projection(module.weight, module.bias)
    a, b = (found.a, found.b) if len(found.a) else (None, None)
    return Projection(module.weight, module.bias, a, b, found.scale, found.dropout, found.gain)


def without_dropout(updates: Updates) -> Updates:
    """Return updates as they count when nothing is trained."""
    return {module: update._replace(dropout=0.0) for module, update in updates.items()}


def unchanged(module: nn.Linear | nn.Embedding) -> Update:
    """Return an update of rank 0, which changes nothing."""
    rows, columns = module.weight.shape
    return Update(module.weight.new_empty(0, columns), module.weight.new_empty(rows, 0), 1.0)


class _Run(NamedTuple):
    """What all layers of one forward share: rotations by number of heads, masks by window, sequences, updates.

    A mask is T × T for plain products of whole sequences, else B × T × T; None where fused attention is causal by
    itself.
    """

    rotation: Rotation
    wide: dict[int, Rotation]
    masks: dict[int | None, Tensor | None]
    plain: bool
    batch: int
    updates: Updates

    def gated(self, x: Tensor, module: nn.Module) -> Tensor:
        """Return x (N × K), which `module` reads, times its gate."""
        found = self.updates.get(module)
        return x if found is None or found.gate is None else x * found.gate.to(x.dtype)


@contextlib.contextmanager
def recomputing(wanted: bool = True) -> Iterator[None]:  # noqa: FBT001, FBT002 - a switch, like torch's own
    """Let forwards inside keep only the states between layers, and backwards compute the rest again.

    With the same random numbers, so that gradients are the same: gradient checkpointing (Chen et al.,
    arXiv 1604.06174).
    """
    token = _RECOMPUTES.set(wanted)
    try:
        yield
    finally:
        _RECOMPUTES.reset(token)


def _rotated(x: Tensor, norm: Any, size: int, run: _Run) -> Tensor:
    if norm is not None:
        x = kernels.rms_norm(x.view(-1, size), norm.weight, norm.variance_epsilon).view_as(x)
    heads = x.shape[1] // size
    if heads not in run.wide:
        run.wide[heads] = run.rotation.wide(heads)
    return kernels.rotate(x, run.wide[heads], size)


def _layer(layer: Any, x: Tensor, run: _Run) -> Tensor:
    """Return the residual stream (N × D) after one layer."""
    if not _absent(layer.self_attn):
        x = _attention(layer, x, run)
    return x if _absent(layer.mlp) else _mlp(layer, x, run)


def _absent(sublayer: Any) -> bool:
    """Return whether a sublayer was taken out, see `modeling_adasearch.leave_out`."""
    return bool(getattr(sublayer, "absent", False))


def _attention(layer: Any, x: Tensor, run: _Run) -> Tensor:
    own = layer.self_attn
    norm, size = layer.input_layernorm, own.head_dim
    reads = tuple(_projection(p, run.updates) for p in (own.q_proj, own.k_proj, own.v_proj))
    q, k, v = kernels.norm_project(x, norm.weight, norm.variance_epsilon, reads)
    q = _rotated(q, getattr(own, "q_norm", None), size, run)
    k = _rotated(k, getattr(own, "k_norm", None), size, run)
    layout = Layout(run.batch, k.shape[1] // size, size, own.scaling)
    mask = run.masks[_window(layer)]
    if run.plain and mask is not None:
        seen = attention.attend(q, k, v, mask, layout)
    else:
        seen = attention.attend_fused(q, k, v, mask, layout)
    seen = run.gated(seen, own.o_proj)
    return kernels.project_add(seen, x, _projection(own.o_proj, run.updates))


def _mlp(layer: Any, x: Tensor, run: _Run) -> Tensor:
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    reads = tuple(_projection(p, run.updates) for p in (mlp.gate_proj, mlp.up_proj))
    gate, up = kernels.norm_project(x, norm.weight, norm.variance_epsilon, reads)
    up = run.gated(up, mlp.down_proj)  # silu(gate) (up m) is (silu(gate) up) m
    return kernels.gated_add(gate, up, x, _projection(mlp.down_proj, run.updates))


def _window(layer: Any) -> int | None:
    """Return how many tokens a layer looks back, None for all; Mistral's layers leave it to their config."""
    attention = layer.self_attn
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window


def causal_mask(length: int, window: int | None, like: Tensor) -> Tensor:
    """Return what is added to scores to hide later tokens, and those `window` or more before (T × T): 0 or -inf."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=like.device).triu_(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril_(-window)
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def _masks(
    core: Any, mask: Tensor | None, segments: Tensor | None, embedded: Tensor, *, plain: bool
) -> dict[int | None, Tensor | None]:
    """Return the mask for every window of the model's layers; one that is given counts for all of them.

    Those of several segments in a sequence are made once for all layers, and hide every other segment.
    """
    batch, length, _ = embedded.shape
    found: dict[int | None, Tensor | None] = {}
    for window in {_window(layer) for layer in core.layers if not _absent(layer.self_attn)}:
        far = window is not None and length > window
        if mask is not None or not (plain or far or segments is not None):
            found[window] = mask
            continue
        own = causal_mask(length, window, embedded)
        if segments is not None:
            found[window] = own.masked_fill(segments[:, :, None] != segments[:, None, :], -torch.inf)
        else:
            found[window] = own if plain else own.expand(batch, -1, -1)
    return found


def restarted(segments: Tensor) -> Tensor:
    """Return positions (B × T, int64) that count from 0 in each run of equal numbers of a line of `segments` (B × T).

    >>> restarted(torch.tensor([[0, 0, 1, 1, 1]])).tolist()
    [[0, 1, 0, 1, 2]]
    """
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    begins = torch.zeros_like(places)
    begins[:, 1:] = places[:, 1:] * (segments[:, 1:] != segments[:, :-1])
    return places - begins.cummax(1).values


def hidden_states(
    model: Any,
    ids: Tensor,
    *,
    updates: Updates | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Return the last hidden states, B × T × D, with a gradient for what requires one.

    Where sequences hold several documents, `segments` tells them apart, in place of `mask` and `positions`: each of
    them has the states that it would have alone.

    Args:
        model: causal language model that `takes` takes; its weights are read, not copied.
        ids: B × T token ids.
        updates: low-rank updates by linear module.
        mask: added to attention scores, B × T × T; None is causal.
        positions: B × T; None counts from 0.
        segments: B × T, equal numbers side by side are one document; None is one document in each sequence.
    """
    core = model.base_model
    batch, length = ids.shape
    assert segments is None or (mask is None and positions is None), "segments make masks and positions"
    embedded = functional.embedding(ids, core.embed_tokens.weight, core.embed_tokens.padding_idx)
    if segments is not None:
        positions = restarted(segments)
    elif positions is None:
        positions = torch.arange(length, device=ids.device).expand(batch, -1)
    cos, sin = core.rotary_emb(embedded, positions)
    plain = ids.device.type == "cpu" and length <= _PLAIN_LENGTH and mask is None and torch.is_grad_enabled()
    rotation = Rotation.of(cos.flatten(0, 1), sin.flatten(0, 1))
    masks = _masks(core, mask, segments, embedded, plain=plain)
    run = _Run(rotation=rotation, wide={}, masks=masks, plain=plain, batch=batch, updates=updates or {})
    x = run.gated(embedded.flatten(0, 1), core.embed_tokens)
    again = _RECOMPUTES.get() and torch.is_grad_enabled()
    for layer in core.layers:
        x = checkpoint(_layer, layer, x, run, use_reentrant=False) if again else _layer(layer, x, run)
    x = kernels.rms_norm(x, core.norm.weight, core.norm.variance_epsilon)
    return x.view(batch, length, -1)


def last_hidden(
    model: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    updates: Updates | None = None,
) -> Tensor:
    """Return the last hidden states, B × T × D, of any causal language model: by `hidden_states` where it stands.

    Args:
        model: in the layout of transformers.
        ids: B × T token ids.
        mask: added to attention scores, B × T × T; None is causal.
        positions: B × T; None counts from 0.
        updates: low-rank updates by linear module; such a model must be one that `takes` takes.
    """
    if takes(model):
        return hidden_states(model, ids, updates=updates, mask=mask, positions=positions)
    assert not updates, "low-rank updates need a model that the decoder takes"
    extra = {} if mask is None else {"attention_mask": mask[:, None], "position_ids": positions}
    states: Tensor = model.base_model(input_ids=ids, use_cache=False, **extra).last_hidden_state
    return states
