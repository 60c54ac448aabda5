"""One NaN or infinity among many numbers is found, and sums that overflow do not mislead."""

import pytest
import torch

from mpqdm_fx.numerics.finite import all_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 517, 999])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_one_bad_number_is_found(bad, place, dtype):
    values = torch.ones(10, 100, dtype=dtype)
    assert all_finite(values)
    values.view(-1)[place] = bad
    assert not all_finite(values)


def test_infinities_of_both_signs_are_found():
    assert not all_finite(torch.tensor([float("inf"), 1.0, float("-inf")]))


@pytest.mark.parametrize("values", [torch.full((9,), 3e38), torch.empty(0), torch.arange(5)])
def test_large_no_and_whole_numbers_are_finite(values):
    assert all_finite(values)
