"""Operations that a stage needs, in closed form: the floor is their number over the measured matrix rate.

Letters: P weights of the projections of all layers; A sum over the layers of query heads times head size; V vocabulary;
D hidden size; R weights of the adapters; T tokens; S positions that the output head is run on; Q pairs of query and key
that the causal mask lets through (T^2 / 2 for one sequence). A multiplication and an addition are two operations.

    forward               2 P T       + 4 A Q      + 2 V D S
    gradient of weights   2 P T                    + 2 V D S
    gradient of inputs    2 P T       + 8 A Q      + 2 V D S

A plain forward is the first line, LLM-Pruner's gradients are all three, LoRA is the first and the last, and 6 R T for
its adapters. Counted is what a way of doing it runs through the matrix units: the output head on every position where
it does that, contexts once or for every choice. Padding is not counted, nor norms, softmax and rotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from adasearch.documents import value
from adasearch.tuning.scoring import EncodedItem

PASSES = {"forward": (1, 1), "gradients": (3, 3), "lora": (2, 3)}
"""Multiples of a forward's operations in the projections and the head, and in the attention."""


@value
class Sizes:
    """The sizes of a model that its operations follow from; letters as above."""

    projections: int
    attention: int
    head: int


@value
class Work:
    """What a stage runs through: tokens, positions of the output head, pairs of attention, operations."""

    tokens: int
    head_positions: int
    pairs: float
    flops: float


def sizes_of(model: Any) -> Sizes:
    """Return the sizes of a decoder in the layout of transformers' Llama."""
    layers = model.model.layers
    linears = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    return Sizes(
        projections=sum(m.weight.numel() for m in linears),
        attention=sum(layer.self_attn.o_proj.in_features for layer in layers),
        head=model.get_output_embeddings().weight.numel(),
    )


def operations(sizes: Sizes, kind: str, work: tuple[int, int, float], *, head_passes: int | None = None) -> Work:
    """Return the work of passes of one kind.

    Args:
        sizes: of the model.
        kind: a name of `PASSES`.
        work: tokens, head positions and pairs.
        head_passes: multiples of a forward in the output head, where it differs from the projections.
    """
    tokens, positions, pairs = work
    linear, attention = PASSES[kind]
    head = linear if head_passes is None else head_passes
    flops = 2.0 * linear * sizes.projections * tokens + 4.0 * attention * sizes.attention * pairs
    return Work(tokens=tokens, head_positions=positions, pairs=pairs, flops=flops + 2.0 * head * sizes.head * positions)


def windows(count: int, length: int) -> tuple[int, int, float]:
    """Return tokens, positions of a next-token loss and pairs of `count` sequences of equal length."""
    return count * length, count * (length - 1), count * length**2 / 2


def adapter_weights(model: Any, rank: int) -> int:
    """Return the weights R of LoRA on every projection of the layers."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    return sum(rank * (m.in_features + m.out_features) for m in linears)


def lora(sizes: Sizes, work: tuple[int, int, float], adapters: int) -> Work:
    """Return the work of training adapters of that many weights beside frozen projections."""
    base = operations(sizes, "lora", work)
    return Work(
        tokens=base.tokens,
        head_positions=base.head_positions,
        pairs=base.pairs,
        flops=base.flops + 6.0 * adapters * base.tokens,
    )


def choices_apart(items: Iterable[EncodedItem]) -> tuple[int, int, float]:
    """Return tokens, head positions and pairs of every choice in a row of its own, logits on every position.

    Sequences that differ in their last token alone go through the model once, as lm-eval's cache of logits has it.
    """
    rows = {(*e.prefix.tolist(), *branch[:-1].tolist()) for e in items for branch in e.branches}
    tokens = sum(map(len, rows))
    return tokens, tokens, sum(len(row) ** 2 for row in rows) / 2


def choices_packed(items: Sequence[EncodedItem]) -> tuple[int, int, float]:
    """Return tokens, head positions and pairs of items whose context runs once, logits where a scored token follows."""
    positions = sum(len(_sources(item)) for item in items)
    pairs = 0.0
    for item in items:
        shared = len(item.prefix)
        pairs += shared**2 / 2 + sum((len(b) - 1) * shared + (len(b) - 1) ** 2 / 2 for b in item.branches)
    return sum(item.tokens for item in items), positions, pairs


def _sources(item: EncodedItem) -> set[tuple[int, int]]:
    """Return the distinct positions that predict a scored token, as (choice or -1 for the context, position)."""
    shared = len(item.prefix)
    found = set()
    for choice, (branch, count) in enumerate(zip(item.branches, item.scored, strict=True)):
        end = shared + len(branch)
        found |= {(choice if place >= shared else -1, place) for place in range(end - count - 1, end - 1)}
    return found
