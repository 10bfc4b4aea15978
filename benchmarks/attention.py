"""Attention of a training step on a CPU: blocks of queries beside whole sequences and torch's fused kernel.

    python -m benchmarks.attention --threads 1

Forward and backward of one layer in the shape of SmolLM2-135M (9 query heads, 3 key heads of 64, bfloat16), 1024 tokens
in sequences of each length; the three ways take turns, processor seconds, the median counts. Out come milliseconds, and
how many times as fast as the fused kernel the blocks are. `tuning.decoder` takes them up to the length that says so.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adasearch.tuning import attention
from adasearch.tuning.attention import Layout
from adasearch.tuning.decoder import causal_mask

TOKENS, HEADS, KEY_HEADS, SIZE = 1024, 9, 3, 64


def ways(length: int, made: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    """Return the forwards of the three ways."""
    layout = Layout(TOKENS // length, KEY_HEADS, SIZE, SIZE**-0.5)
    mask, block = causal_mask(length, None, made[0]), attention._BLOCK

    def plain(size: int) -> Tensor:
        attention._BLOCK = size
        out = attention.attend(*made, mask, layout)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        attention._BLOCK = block
        return out

    def fused() -> Tensor:
        out = attention.attend_fused(*made, None, layout)
        out.backward(torch.ones_like(out))  # type: ignore[no-untyped-call]
        return out

    return {"blocks": lambda: plain(block), "whole": lambda: plain(length), "fused": fused}


def measure(length: int, repeat: int) -> dict[str, float]:
    """Return the median processor seconds of each way."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, heads * SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    made = tuple(torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes)
    found: dict[str, list[float]] = {}
    for _ in range(repeat + 1):
        for name, way in ways(length, made).items():
            begun = time.process_time()
            way()
            found.setdefault(name, []).append(time.process_time() - begun)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| length | blocks | whole | fused | fused / blocks |\n|---|---|---|---|---|")
    for length in (128, 256, 512, 1024):
        found = measure(length, args.repeat)
        cells = [f"{1000 * found[name]:.0f} ms" for name in ("blocks", "whole", "fused")]
        print(f"| {length} | {' | '.join(cells)} | {found['fused'] / found['blocks']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
