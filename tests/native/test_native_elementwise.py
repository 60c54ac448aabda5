"""Quantization in C++ is the torch reference's bit by bit; group norm is near it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the reference)

ops = torch.ops.mpqdm


def assert_same_codes(native, x, parts, threads=1):
    expected = ops.quantize_mixed(x, parts)
    for name in native.kernel_sets:
        for got, wanted in zip(native.quantize(name, x, parts, threads), expected, strict=True):
            assert torch.equal(got.nan_to_num(-1), wanted.nan_to_num(-1)), name


@given(
    parts=st.integers(1, 6),
    size=st.integers(1, 200),
    width=st.sampled_from([1e-38, 1e-3, 1.0, 1e4, 1e37]),
    shift=st.sampled_from([0.0, 0.5, -0.5, 3.0, -3.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_quantization(native, parts, size, width, shift, threads, seed):
    source = torch.Generator().manual_seed(seed)
    x = width * (torch.rand(parts, size, generator=source) - 0.5 + shift)
    assert_same_codes(native, x, parts, threads)


@pytest.mark.parametrize("threads", [1, 3])
def test_quantization_of_a_part_that_threads_share(native, threads):
    x = torch.randn(2, 70001, generator=torch.Generator().manual_seed(0))
    assert_same_codes(native, x, 2, threads)
    x[1, 69999] = torch.nan
    assert_same_codes(native, x, 2, threads)


@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, torch.inf, -torch.inf])
def test_quantization_of_one_number(native, number):
    assert_same_codes(native, torch.full((1, 40), number), 1)
    assert_same_codes(native, torch.tensor([[0.5, number, -2.0]]), 1)


def test_halves_go_to_the_even_code(native):
    # 256 levels of step 1 from -128 to 127: the zero point is 0, and every second half ties
    x = torch.cat([torch.tensor([-128.0, 127.0]), torch.arange(-127.5, 127.0)])
    assert_same_codes(native, x, 1)
    assert ops.quantize_mixed(x, 1)[0][2:5].tolist() == [-128, -126, -126]


@given(
    scale=st.sampled_from([1.2e-38, 1e-5, 1 / 3, 1.0, 7.5, 1e30]),
    zero_point=st.integers(-128, 127),
    steps=st.sampled_from([0.5, 20.0, 300.0, 1e8]),
    number=st.sampled_from([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 3e38]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_quantization_on_a_known_range(native, scale, zero_point, steps, number, threads, seed):
    x = scale * steps * torch.randn(157, generator=torch.Generator().manual_seed(seed))
    x[seed % 157] = number
    known = torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)
    expected = ops.quantize_static_mixed(x, *known)
    for name in native.kernel_sets:
        got = native.quantize_static(name, x, *map(torch.Tensor.item, known), threads)
        assert torch.equal(got, expected), name


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    groups=st.integers(1, 5),
    width=st.integers(1, 9),
    silu=st.booleans(),
    mean=st.sampled_from([0.0, 2.0, -50.0]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_group_norm(native, shape, groups, width, silu, mean, threads, seed):
    source = torch.Generator().manual_seed(seed)
    channels = groups * width
    x = torch.randn(*shape, channels, generator=source) + mean
    weight, bias, factor = torch.randn(3, channels, generator=source)
    expected = ops.group_norm_mixed(x, weight, bias, factor, groups, 1e-2, silu)
    # a mean far from 0 is subtracted from products of its size
    bound = 4e-6 * expected.abs().clamp(min=1) + 2.5e-7 * (x * weight * factor).abs() / 0.1
    for name in native.kernel_sets:
        got = native.group_norm(name, x, weight, bias, factor, groups, 1e-2, silu, threads)
        assert ((got - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("place", [0, 1234])
def test_group_norm_of_a_spot_on_a_flat_image(native, place):
    """The variance is that of one pixel, of which squares about it would lose much."""
    x = torch.full((1, 64, 64, 4), 0.1)
    x.view(-1, 4)[place] = 10.0
    one, zero = torch.ones(4), torch.zeros(4)
    expected = ops.group_norm_mixed(x, one, zero, one, 4, 1e-6, False)
    for name in native.kernel_sets:
        got = native.group_norm(name, x, one, zero, one, 4, 1e-6, False, 1)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_the_number_of_threads_changes_no_bit(native):
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 48, 32, generator=source)
    ones = torch.ones(32)
    for name in native.kernel_sets:
        alone = native.group_norm(name, x, ones, ones, ones, 4, 1e-5, True, 1)
        assert torch.equal(native.group_norm(name, x, ones, ones, ones, 4, 1e-5, True, 3), alone), (
            name
        )


@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 37, 199])
def test_a_group_with_a_number_that_is_none_is_nan(native, place, number):
    x = torch.randn(1, 5, 5, 8, generator=torch.Generator().manual_seed(0))
    x.view(-1)[place] = number
    ones = torch.ones(8)
    expected = ops.group_norm_mixed(x, ones, ones, ones, 2, 1e-5, True)
    assert expected.isnan().sum() == 100
    for name in native.kernel_sets:
        got = native.group_norm(name, x, ones, ones, ones, 2, 1e-5, True, 1)
        assert torch.equal(got.isnan(), expected.isnan()), name
