"""Products over tokens are float32 products, bfloat16 inputs included, and leave the process as it was."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.pruning import products

SIZES = st.sampled_from([1, 5, 383, 384, 385, 800])


def _whole_numbers(seed, *shape, dtype=torch.bfloat16):
    """Small whole numbers: their products and sums are exact in float32, whatever the order of the additions."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(SIZES, st.integers(1, 70), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_products_of_whole_numbers_are_exact(features, tokens, dtype):
    x, y = _whole_numbers(0, tokens, features, dtype=dtype), _whole_numbers(1, tokens, 6, dtype=dtype)
    exact = x.double().T @ y.double()
    assert torch.equal(products.product(x, y).double(), exact)
    assert products.product(x, y).dtype == torch.float32
    packed = products.packed_gram(x)
    products.add_gram(packed, x)
    assert packed.dtype == torch.float32
    assert torch.equal(products.unpacked_gram(packed, features), 2 * x.double().T @ x.double())


@pytest.mark.parametrize("rows", [3, 900])
def test_squares_are_of_each_sequence(rows):
    a, b = _whole_numbers(2, 4, 20, rows), _whole_numbers(3, 4, 20, 700)
    exact = a.double().transpose(1, 2) @ b.double()
    total, squares = torch.zeros(rows, 700), torch.zeros(rows, 700)
    products.add_products(total, squares, a, b)
    assert torch.equal(total.double(), exact.sum(0))
    torch.testing.assert_close(squares.double(), exact.square().sum(0), rtol=1e-6, atol=0)


def test_bfloat16_products_are_as_exact_as_float32():
    x = torch.randn(600, 800, generator=torch.Generator().manual_seed(4)).bfloat16() + 1
    exact = x.double().T @ x.double()
    error = (products.product(x, x).double() - exact).abs().max() / exact.abs().max()
    assert float(error) < 1e-6


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_the_precision_of_the_process_stays(before):
    matmul, held = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    matmul.fp32_precision = before
    try:
        products.product(_whole_numbers(0, 4, 4), _whole_numbers(0, 4, 4))
        assert matmul.fp32_precision == before
        with pytest.raises(RuntimeError):
            products.product(_whole_numbers(0, 4, 4), _whole_numbers(0, 5, 4))
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = held
