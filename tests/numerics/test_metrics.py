import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_strategies import weight_rows

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.metrics import sqnr_db


def test_noise_of_a_tenth_of_the_signal_is_twenty_decibels():
    x = torch.randn(1000, dtype=torch.float64)
    assert sqnr_db(x, x * 0.9) == pytest.approx(20.0, abs=1e-9)


@given(weight_rows())
def test_identical_tensors_have_infinite_sqnr(W):
    assert sqnr_db(W, W.clone()) == math.inf


@given(weight_rows(), st.integers(0, 2**16), st.floats(0.1, 10))
def test_sqnr_does_not_change_when_both_tensors_are_scaled(W, seed, factor):
    noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(seed)).double()
    reference = W.double() + 1e-30  # never all zero
    test = reference + noise * reference.abs().amax()
    assert sqnr_db(reference * factor, test * factor) == pytest.approx(
        sqnr_db(reference, test), abs=1e-6
    )


def test_a_tiny_error_is_not_lost_in_float32():
    x = torch.ones(10, dtype=torch.float64)
    assert sqnr_db(x, x * (1 - 1e-12)) == pytest.approx(240, abs=0.1)


def test_float32_extremes_do_not_overflow():
    x = torch.full((4,), 3e38)
    assert sqnr_db(x, x / 2) == pytest.approx(20 * math.log10(2), abs=1e-6)


def test_a_zero_reference_with_noise_is_minus_infinity():
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@pytest.mark.parametrize("reference", [torch.ones(2), torch.zeros(2)])
def test_nan_is_reported_as_nan(reference):
    assert math.isnan(sqnr_db(reference, torch.tensor([1.0, math.nan])))


def test_different_shapes_are_refused():
    with pytest.raises(ConfigError, match=r"\(3,\).*\(3, 1\)"):
        sqnr_db(torch.zeros(3), torch.zeros(3, 1))


def test_both_parts_of_complex_numbers_count():
    reference = torch.complex(torch.ones(8), torch.ones(8))
    assert sqnr_db(reference, torch.complex(torch.ones(8), torch.zeros(8))) == pytest.approx(3.0103)
    assert sqnr_db(reference, reference.conj().conj()) == math.inf
