"""Sums of products of whole numbers, exact whatever their length."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mpqdm_fx.numerics import exact_products
from mpqdm_fx.numerics.exact_products import exact_convolution, exact_product


def draw(shape, largest, seed):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=source).float()


BOUNDS = st.tuples(st.sampled_from([0, 1, 255]), st.sampled_from([0, 1, 3, 15, 128]))


@given(
    rows=st.integers(1, 5),
    depth=st.integers(1, 2000),
    bounds=BOUNDS,
    seed=st.integers(0, 2**16),
)
@example(rows=2, depth=1029, bounds=(255, 128), seed=0)
def test_products(rows, depth, bounds, seed):
    inputs, weights = draw((3, depth), bounds[0], seed), draw((rows, depth), bounds[1], seed + 1)
    result = exact_product(inputs, weights)
    assert torch.equal(result.long(), inputs.long() @ weights.long().T)


@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([1, 4, 60, 300]),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    padded=st.booleans(),
    bounds=BOUNDS,
    seed=st.integers(0, 2**16),
)
def test_convolutions(batch, size, channels, kernel, stride, padded, bounds, seed):
    padding = kernel // 2 if padded or min(size) < kernel else 0
    images = draw((batch, *size, channels), bounds[0], seed)
    weights = draw((3, kernel, kernel, channels), bounds[1], seed + 1)
    result = exact_convolution(images, weights, stride, padding)
    exact = torch.nn.functional.conv2d(
        images.permute(0, 3, 1, 2).double(),
        weights.permute(0, 3, 1, 2).double(),
        stride=stride,
        padding=padding,
    )
    assert torch.equal(result.double(), exact.permute(0, 2, 3, 1).reshape(-1, 3))


@pytest.mark.parametrize("depth", [514, 515, 5760, 65536])
def test_the_largest_sums_there_are(depth):
    inputs, weights = torch.full((1, depth), 255.0), torch.full((1, depth), -128.0)
    weights[0, 0] = -127.0  # an odd sum: float32 would round it
    result = exact_product(inputs, weights)
    assert result.item() == -255 * 128 * depth + 255
    assert result.dtype == (torch.float32 if depth == 514 else torch.float64)


def test_no_piece_is_longer_than_float32_allows(monkeypatch):
    monkeypatch.setattr(exact_products, "_EXACT", 1 << 40)  # one piece
    inputs, weights = torch.full((1, 5761), 255.0), torch.full((1, 5761), 127.0)
    assert exact_product(inputs, weights).item() != 255 * 127 * 5761
