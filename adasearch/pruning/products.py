"""Matrix products over tokens, A^T B, accumulated and given in float32 whatever the activations are.

Activations of a bfloat16 model are exact in bfloat16, and a product of two bfloat16 numbers is exact in float32: where
the inputs are bfloat16, matrix units that multiply bfloat16 and accumulate float32 give what float32 arithmetic gives,
up to the order of the additions, several times as fast. Anything else is multiplied in float32.

Shape letters: T tokens, M and N features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_BLOCK = 384
"""Rows of a Gram matrix computed at a time: smaller saves more of the lower triangle, larger runs more efficiently."""

_CACHED = 2**18
"""Elements of a float32 block of which three fit into the second-level cache of one core."""

_TILE = 64
"""Rows that matrix units take at a time, or a multiple: blocks of other sizes leave them partly idle."""

Multiply = Callable[[Tensor, Tensor], Tensor]


@contextlib.contextmanager
def _inputs_in_bfloat16() -> Iterator[None]:
    """Let float32 products on the CPU round their inputs to bfloat16 for a while, which changes no such input.

    The setting belongs to the process, so it is held around single products and never around a model, whose rotary
    angles are float32 products that it would spoil. Processors without such units ignore it.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # a property of the module object
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _narrow(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


@contextlib.contextmanager
def _multiplying(*inputs: Tensor) -> Iterator[tuple[list[Tensor], Multiply]]:
    """Yield `inputs` in the format in which they are best multiplied, and the function that multiplies two of them."""
    exact = all(x.dtype == torch.bfloat16 for x in inputs)
    if exact and inputs[0].device.type == "cuda":
        yield list(inputs), _narrow
        return
    with _inputs_in_bfloat16() if exact else contextlib.nullcontext():
        yield [x.float() for x in inputs], torch.mm


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b (M × N, float32) of a (T × M) and b (T × N)."""
    with _multiplying(a, b) as ((left, right), multiply):
        return multiply(left.T, right)


def _row_blocks(features: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of rows of an upper triangle (N × N), each with its place in the packed vector."""
    start = 0
    for first in range(0, features, _BLOCK):
        rows = slice(first, min(first + _BLOCK, features))
        size = (rows.stop - first) * (features - first)
        yield rows, slice(start, start + size)
        start += size


def packed_gram(x: Tensor) -> Tensor:
    """Return x^T x (N × N, for x of T × N) as a float32 vector: its upper triangle, block of rows by block of rows.

    A block of rows begins at its column on the diagonal, so a few elements below the diagonal are held twice. At
    N = 1536 the vector is 0.63 of the matrix.
    """
    size = max(place.stop for _, place in _row_blocks(x.shape[1]))
    packed = torch.empty(size, dtype=torch.float32, device=x.device)
    with _multiplying(x) as ((wide,), multiply):
        for rows, place in _row_blocks(x.shape[1]):
            packed[place] = multiply(wide[:, rows].T, wide[:, rows.start :]).flatten()
    return packed


def add_gram(packed: Tensor, x: Tensor) -> None:
    """Add x^T x to what `packed_gram` gave, in place."""
    with _multiplying(x) as ((wide,), multiply):
        for rows, place in _row_blocks(x.shape[1]):
            packed[place] += multiply(wide[:, rows].T, wide[:, rows.start :]).flatten()


def unpacked_gram(packed: Tensor, features: int) -> Tensor:
    """Return the whole symmetric matrix (N × N, float64) of what `packed_gram` gave."""
    matrix = torch.zeros(features, features, dtype=torch.float64, device=packed.device)
    for rows, place in _row_blocks(features):
        matrix[rows, rows.start :] = packed[place].view(rows.stop - rows.start, -1)
    return matrix.triu_() + matrix.triu(1).T


def add_products(total: Tensor, squares: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a_n^T b_n to `total` (M × N, float32) and its elementwise square to `squares`, for each sequence n.

    Rows go block by block, so that a block of both sums stays in the processor's cache while all sequences pass.

    Args:
        total: changed in place.
        squares: changed in place.
        a: sequences × T × M.
        b: sequences × T × N.
    """
    rows = max(_TILE, _CACHED // b.shape[2] // _TILE * _TILE)
    with _multiplying(a, b) as ((left, right), multiply):
        for i in range(0, a.shape[2], rows):
            for x, y in zip(left[:, :, i : i + rows], right, strict=True):
                new = multiply(x.T, y)
                total[i : i + rows] += new
                squares[i : i + rows].addcmul_(new, new)
