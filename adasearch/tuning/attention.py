"""Attention for training: plain products by blocks of queries with a gradient by hand, or torch's fused kernel.

Shape letters: N rows, of B sequences of T tokens; H heads of E dimensions; G query heads that share a key head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def _by_key_head(x: Tensor, batch: int, key_heads: int, size: int) -> Tensor:
    """Return rows (N × (heads E)) as (B * key heads) × (G T) × E: queries that share keys lie together."""
    length = x.shape[0] // batch
    parts = x.view(batch, length, key_heads, -1, size).permute(0, 2, 3, 1, 4)
    return parts.reshape(batch * key_heads, -1, size)


def _as_rows(x: Tensor, batch: int, length: int) -> Tensor:
    """Undo `_by_key_head`."""
    size = x.shape[-1]
    parts = x.view(batch, x.shape[0] // batch, -1, length, size).permute(0, 3, 1, 2, 4)
    return parts.reshape(batch * length, -1)


_BLOCK = 128
"""Queries that are multiplied at once: they see no later keys, so blocks of them spare nearly half of the products."""


class _Attend(torch.autograd.Function):
    """Blocks of queries see the keys up to their own end; rows of a block lie together by the head that they read."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layout: Any) -> Tensor:
        batch, key_heads, size, scale = layout
        q, k, v = (_by_key_head(x, batch, key_heads, size) for x in (q, k, v))
        length, groups = k.shape[1], q.shape[1] // k.shape[1]
        out, weights = torch.empty_like(q), []
        for block in _blocks(length):
            shift = mask[..., block, : block.stop]
            shift = shift.repeat(*(1,) * (shift.dim() - 2), groups, 1)
            shift = shift[None] if mask.dim() == 2 else shift.repeat_interleave(key_heads, 0)
            scores = torch.baddbmm(shift, _part(q, groups, block), k[:, : block.stop].transpose(1, 2), alpha=scale)
            weights.append(scores.softmax(-1))
            _put(out, groups, block, torch.bmm(weights[-1], v[:, : block.stop]))
        ctx.layout = (batch, length, groups, scale)
        ctx.save_for_backward(q, k, v, out, *weights)
        return _as_rows(out, batch, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, *every = ctx.saved_tensors
        batch, length, groups, scale = ctx.layout
        grad = _by_key_head(grad, batch, len(k) // batch, k.shape[-1])
        shares = (grad * out).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block, weights in zip(_blocks(length), every, strict=True):
            seen, part = slice(block.stop), _part(grad, groups, block)
            dv[:, seen] += torch.bmm(weights.transpose(1, 2), part)
            ds = torch.bmm(part, v[:, seen].transpose(1, 2)).sub_(_part(shares, groups, block)).mul_(weights)
            _put(dq, groups, block, torch.bmm(ds, k[:, seen]))
            dk[:, seen] += torch.bmm(ds.transpose(1, 2), _part(q, groups, block))
        dq, dk = dq.mul_(scale), dk.mul_(scale)
        return _as_rows(dq, batch, length), _as_rows(dk, batch, length), _as_rows(dv, batch, length), None, None


def _blocks(length: int) -> list[slice]:
    return [slice(first, min(first + _BLOCK, length)) for first in range(0, length, _BLOCK)]


def _part(x: Tensor, groups: int, block: slice) -> Tensor:
    """Return the rows of a block of positions, of all heads that share keys (H × (G T) × E)."""
    rows = x.view(len(x), groups, -1, x.shape[-1])
    return rows[:, :, block].reshape(len(x), -1, x.shape[-1])


def _put(x: Tensor, groups: int, block: slice, part: Tensor) -> None:
    """Set what `_part` returns."""
    x.view(len(x), groups, -1, x.shape[-1])[:, :, block] = part.view(len(x), groups, -1, x.shape[-1])


class Layout(NamedTuple):
    """How rows are heads: B sequences, key-value heads, head size E, and the factor of the attention scores."""

    batch: int
    key_heads: int
    size: int
    scale: float


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layout: Layout) -> Tensor:
    """Return what short sequences attend to, as rows (N × (H E)): plain products, softmax weights kept.

    Args:
        q: N × (H E).
        k: N × (key heads E).
        v: as k.
        mask: added to the scores, T × T, or B × T × T where the sequences have their own.
        layout: of the rows.
    """
    result: Tensor = _Attend.apply(q, k, v, mask, tuple(layout))  # type: ignore[no-untyped-call]
    return result


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: Layout) -> Tensor:
    """Return the same by torch's fused attention, which holds no T × T weights; `mask` B × T × T, None is causal."""
    q, k, v = (x.view(layout.batch, -1, x.shape[1] // layout.size, layout.size).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=layout.scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).reshape(-1, q.shape[1] * layout.size)
