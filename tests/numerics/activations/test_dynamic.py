"""Ranges computed at run time: the law of the formula, and what it promises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.activations.dynamic import dynamic_qparams, fake_quantize_dynamic

finite = st.floats(-(2.0**100), 2.0**100, width=32)
ends = st.tuples(finite, finite).map(sorted)


def by_hand(low: float, high: float, bits: int) -> tuple[np.float32, int]:
    """XNNPACK's qd8 parameters, one float32 operation at a time."""
    f = np.float32
    quant_min, quant_max = f(-(2 ** (bits - 1))), f(2 ** (bits - 1) - 1)
    low, high = min(f(low), f(0)), max(f(high), f(0))
    with np.errstate(divide="ignore", over="ignore"):
        inverse = f(1) if low == high else (quant_max - quant_min) / (high - low)
    if math.isinf(inverse):
        inverse = f(1)
    low, high = low * inverse, high * inverse
    from_low = (quant_min + low) + (quant_max + high) > 0
    zero_point = quant_min - low if from_low else quant_max - high
    return inverse, int(np.rint(min(max(zero_point, quant_min), quant_max)))


@given(ends, st.integers(1, 8))
def test_parameters_are_those_of_the_formula_bit_for_bit(interval, bits):
    low, high = (torch.tensor(end, dtype=torch.float32) for end in interval)
    inverse, zero_point = dynamic_qparams(low, high, bits)
    assert (np.float32(inverse.item()), int(zero_point)) == by_hand(*interval, bits)


def rows(seed: int, bits: int = 8):
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** torch.randint(-3, 4, (5, 1), generator=generator)
    shift = torch.randn(5, 1, generator=generator)
    return (torch.randn(5, 16, generator=generator) + shift) * spread


@given(st.integers(0, 2**16), st.integers(1, 8))
def test_every_row_has_its_own_grid_of_the_given_width(seed, bits):
    x = rows(seed)
    got = fake_quantize_dynamic(x, bits, 1)
    for row, rounded in zip(x, got, strict=True):
        inverse, zero_point = by_hand(row.min().item(), row.max().item(), bits)
        step = 1.0 / float(inverse)
        codes = rounded.double() / step
        assert torch.allclose(codes, codes.round(), atol=1e-4)
        assert codes.round().min() + zero_point >= -(2 ** (bits - 1))
        assert codes.round().max() + zero_point <= 2 ** (bits - 1) - 1
        # the nudged zero point costs half a step at one end, rounding another half
        assert (row - rounded).abs().max() <= step * (1.0 + 1e-4)


@given(st.integers(0, 2**16), st.integers(0, 4))
def test_a_row_does_not_depend_on_its_neighbours(seed, row):
    x = rows(seed)
    alone = fake_quantize_dynamic(x[row : row + 1], 8, 1)
    assert torch.equal(fake_quantize_dynamic(x, 8, 1)[row : row + 1], alone)


@given(st.integers(0, 2**16))
def test_axes_say_what_shares_a_range(seed):
    x = rows(seed).reshape(5, 2, 8)
    assert torch.equal(
        fake_quantize_dynamic(x, 8, 2), fake_quantize_dynamic(x.flatten(1), 8, 1).view_as(x)
    )
    whole = fake_quantize_dynamic(x.reshape(1, -1), 8, 1).view_as(x)
    assert torch.equal(fake_quantize_dynamic(x, 8, 3), whole)


@given(st.integers(0, 2**16), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_computed_in_float32(seed, dtype):
    x = rows(seed).to(dtype)
    got = fake_quantize_dynamic(x, 8, 1)
    assert got.dtype == dtype
    assert torch.equal(got, fake_quantize_dynamic(x.float(), 8, 1).to(dtype))


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45, 3.0, -3.0, 1e30])
def test_zero_is_exact_and_a_constant_row_stays_finite(value):
    x = torch.full((2, 4), value)
    x[1] = 0.0
    got = fake_quantize_dynamic(x, 8, 1)
    assert got.isfinite().all()
    assert torch.equal(got[1], torch.zeros(4))
    assert torch.allclose(got[0], x[0], rtol=1e-6, atol=1e-40)


def test_impossible_widths_are_refused():
    with pytest.raises(ConfigError, match="9 bits"):
        dynamic_qparams(torch.zeros(1), torch.ones(1), 9)
