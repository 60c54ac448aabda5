import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.numerics.halves import fits_half, stored_float_bits


@given(st.lists(st.floats(width=16, allow_nan=False), min_size=1))
def test_half_precision_values_fit(values):
    tensor = torch.tensor(values, dtype=torch.float32)
    assert fits_half(tensor)
    assert stored_float_bits(tensor) == 16


@given(
    st.floats(0.5, 100).filter(lambda v: float(torch.tensor(v).half()) != float(torch.tensor(v)))
)
def test_one_value_that_loses_bits_keeps_the_tensor_wide(value):
    tensor = torch.tensor([1.0, value], dtype=torch.float32)
    assert not fits_half(tensor)
    assert stored_float_bits(tensor) == 32


def test_values_beyond_half_precisions_range_do_not_fit():
    assert not fits_half(torch.tensor([1e6]))


def test_other_dtypes_are_stored_as_they_are():
    assert stored_float_bits(torch.ones(2, dtype=torch.float64)) == 64
    assert stored_float_bits(torch.ones(2, dtype=torch.bfloat16)) == 16
    assert stored_float_bits(torch.ones(2, dtype=torch.int64)) == 64
