"""The reference of the low-bit operators: exact integers, then float steps in a stated order."""

import math

import numpy as np
import pytest
import torch
from blob_rows import flat_rows, layers
from hypothesis import example, given
from hypothesis import strategies as st

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the operators)
from mpqdm_fx.backends.lowbit.blob import pack_blob
from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.activations.dynamic import fake_quantize_dynamic

ops = torch.ops.mpqdm


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn_codes(shape, parts, seed):
    """Codes over all of int8, with ranges of `parts` parts."""
    source = generator(seed)
    codes = torch.randint(-128, 128, shape, generator=source).to(torch.int8)
    zero_point = torch.randint(-128, 128, (parts,), generator=source).to(torch.int32)
    return codes, torch.rand(parts, generator=source) + 1e-3, zero_point


def values(codes, scale, zero_point):
    """Numbers that codes stand for, float64."""
    runs = codes.to(torch.float64).reshape(len(scale), -1) - zero_point[:, None]
    return (runs * scale[:, None].to(torch.float64)).reshape(codes.shape)


def weights(codes, scale):
    return codes.to(torch.float64) * scale.to(torch.float64).reshape(-1, *[1] * (codes.ndim - 1))


def doubled(bias):
    return None if bias is None else bias.to(torch.float64)


def assert_rounded(result, exact, size):
    """Results are float32 within four roundings of the exact ones; `size` bounds the terms.

    The exact ones are float64 sums of up to 2^24, off by 1e-8 at most.
    """
    assert result.dtype == torch.float32
    assert result.shape == exact.shape
    assert ((result.to(torch.float64) - exact).abs() <= 4 * 2.0**-24 * size + 1e-8).all()


@given(
    layer=layers(max_rows=12, max_groups=5),
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.sampled_from([1, 2]),
    padded=st.booleans(),
    one_range=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_convolutions_are_those_of_the_numbers(layer, batch, size, stride, padded, one_range, seed):
    codes, scale, bias = layer
    kernels = codes if codes.ndim == 4 else codes[:, :, None, None]
    kernel = kernels.shape[2]
    padding = kernel // 2 if padded or min(size) < kernel else 0
    images = drawn_codes((batch, *size, kernels.shape[1]), 1 if one_range else batch, seed)
    blob = pack_blob(codes, scale, bias)
    result = ops.conv2d_mixed(*images, blob, len(codes), kernel, stride, padding)
    pixels, factors = values(*images).permute(0, 3, 1, 2), weights(kernels, scale)
    how = {"stride": stride, "padding": padding}
    exact = torch.nn.functional.conv2d(pixels, factors, doubled(bias), **how)
    # the sums are exact: only their own sizes and the bias's are rounded
    plain = torch.nn.functional.conv2d(pixels, factors, **how).abs()
    bound = plain + (0 if bias is None else bias.abs()[:, None, None])
    assert_rounded(result, exact.permute(0, 2, 3, 1), bound.permute(0, 2, 3, 1))


@given(
    layer=layers(max_rows=12, kernels=(1,)),
    shape=st.lists(st.integers(1, 4), max_size=3),
    ranges=st.sampled_from(["whole", "rows"]),
    seed=st.integers(0, 2**16),
)
def test_linear_layers_are_those_of_the_numbers(layer, shape, ranges, seed):
    codes, scale, bias = layer
    parts = math.prod(shape) if ranges == "rows" else 1
    inputs = drawn_codes((*shape, codes.shape[1]), parts, seed)
    result = ops.linear_mixed(*inputs, pack_blob(codes, scale, bias), len(codes))
    exact = torch.nn.functional.linear(values(*inputs), weights(codes, scale), doubled(bias))
    plain = torch.nn.functional.linear(values(*inputs), weights(codes, scale)).abs()
    assert_rounded(result, exact, plain + (0 if bias is None else bias.abs()))


@given(layer=layers(max_rows=12, kernels=(1,)), rows=st.integers(1, 5), seed=st.integers(0, 2**16))
def test_floats_are_rounded_in_the_order_of_the_format(layer, rows, seed):
    codes, scale, bias = layer
    inputs, steps, zero_point = drawn_codes((rows, codes.shape[1]), rows, seed)
    result = ops.linear_mixed(inputs, steps, zero_point, pack_blob(codes, scale, bias), len(codes))
    centred = inputs.numpy().astype(np.int64) - zero_point.numpy()[:, None]
    sums = (centred @ codes.numpy().astype(np.int64).T).astype(np.float32)
    expected = sums * (steps.numpy()[:, None] * scale.numpy())
    if bias is not None:
        expected = expected + bias.numpy()
    assert expected.dtype == np.float32
    assert np.array_equal(result.numpy(), expected)


def test_the_largest_sums_are_exact():
    codes = torch.full((8, 65536), -128, dtype=torch.int8)
    codes[:, 1:3] = torch.tensor([127, 3], dtype=torch.int8)
    inputs = torch.full((1, 65536), -128, dtype=torch.int8)
    zero_point = torch.tensor([127], dtype=torch.int32)
    result = ops.linear_mixed(inputs, torch.ones(1), zero_point, pack_blob(codes, torch.ones(8)), 8)
    exact = 255 * (128 * 65534 - 127 - 3)
    assert torch.equal(result, torch.full((1, 8), float(np.float32(exact))))


@given(layer=layers(max_rows=12, kernels=(1,)), seed=st.integers(0, 2**16))
def test_a_pointwise_convolution_is_a_linear_layer_with_a_range_a_pixel(layer, seed):
    blob, rows = pack_blob(*layer), len(layer[0])
    images = drawn_codes((2, 3, 2, layer[0].shape[1]), 12, seed)
    convolved = ops.conv2d_mixed(*images, blob, rows, 1, 1, 0)
    assert torch.equal(convolved, ops.linear_mixed(*images, blob, rows))


def drawn_numbers(shape, seed, magnitude=1.0, shift=0.0):
    return (torch.randn(shape, generator=generator(seed)) + shift) * magnitude


@given(
    parts=st.integers(1, 5),
    size=st.integers(1, 40),
    magnitude=st.sampled_from([1e-40, 1e-30, 1.0, 1e20, 1e37]),
    shift=st.sampled_from([-9.0, 0.0, 4.0]),
    seed=st.integers(0, 2**16),
)
@example(parts=2, size=3, magnitude=0.0, shift=0.0, seed=0)
def test_quantizing_is_what_the_sweep_measures(parts, size, magnitude, shift, seed):
    x = drawn_numbers((parts, size), seed, magnitude, shift)
    codes, scale, zero_point = ops.quantize_mixed(x, parts)
    assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float32, torch.int32)
    assert codes.shape == x.shape
    # steps of at most 255 are exact in float32, so the numbers are equal and not merely close
    steps = codes.to(torch.float32) - zero_point[:, None]
    assert torch.equal(scale[:, None] * steps, fake_quantize_dynamic(x, 8, 1))


def test_parts_are_runs_of_the_elements_in_order():
    x = drawn_numbers((2, 3, 4, 8), 0)
    for parts in (1, 2, 6, 24):
        results = ops.quantize_mixed(x, parts)
        expected = ops.quantize_mixed(x.reshape(parts, -1), parts)
        assert torch.equal(results[0].reshape(parts, -1), expected[0])
        assert torch.equal(results[1], expected[1])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_come_out_as_nan_in_their_own_part(wrong):
    x = drawn_numbers((2, 3, 3, 4), 0)
    x[1, 2, 0, 3] = wrong
    codes, scale, zero_point = ops.quantize_mixed(x, 2)
    assert scale.isnan().tolist() == [False, True]
    assert not codes[1].any()
    assert zero_point[1] == 0
    assert torch.equal(codes[0], ops.quantize_mixed(x[:1], 1)[0][0])
    blob = pack_blob(torch.eye(4, dtype=torch.int8), torch.ones(4), torch.ones(4))
    convolved = ops.conv2d_mixed(codes, scale, zero_point, blob, 4, 1, 1, 0)
    linear = ops.linear_mixed(codes, scale, zero_point, blob, 4)
    normal = ops.group_norm_mixed(x, *[torch.ones(4)] * 3, 1, 1e-5, True)
    for result in (convolved, linear, normal):
        assert result[0].isfinite().all()
        assert result[1].isnan().all()


@given(
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(2, 5), st.integers(1, 5)),  # torch refuses a single number
    groups=st.integers(1, 4),
    width=st.integers(1, 4),
    silu=st.booleans(),
    shift=st.sampled_from([0.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_group_norm_is_torchs(batch, size, groups, width, silu, shift, seed):
    channels = groups * width
    x = drawn_numbers((batch, *size, channels), seed, shift=shift)
    weight, bias, factor = drawn_numbers((3, channels), seed + 1)
    norm = (x, weight, bias, factor, groups, 1e-5, silu)
    result = ops.group_norm_mixed(*norm)
    wide = x.double().permute(0, 3, 1, 2)
    exact = torch.nn.functional.group_norm(wide, groups, weight.double(), bias.double(), 1e-5)
    exact = (torch.nn.functional.silu(exact) if silu else exact).permute(0, 2, 3, 1) * factor
    torch.testing.assert_close(result, exact.float(), rtol=1e-6, atol=1e-9)
    both = ops.group_norm_quantize_mixed(*norm)
    for got, expected in zip(both, ops.quantize_mixed(result, batch), strict=True):
        assert torch.equal(got, expected)


def small_layer(kernel=1):
    codes = torch.randint(-7, 8, (12, 8, kernel, kernel), generator=generator(0)).to(torch.int8)
    return flat_rows(codes) if kernel == 1 else codes, torch.rand(12, generator=generator(1)) + 0.1


IMAGES = (2, 5, 4, 8)


def test_a_changed_blob_gives_its_own_results():
    codes, scale = small_layer()
    images, blob = drawn_codes(IMAGES, 2, 0), pack_blob(codes, scale)
    first = ops.linear_mixed(*images, blob, 12)
    blob.copy_(pack_blob(codes, 2 * scale))
    assert torch.equal(ops.linear_mixed(*images, blob, 12), 2 * first)
    blob[-1] ^= 1
    with pytest.raises(ArtifactError, match="bad checksum"):
        ops.linear_mixed(*images, blob, 12)


def convolved(settings=(12, 3, 1, 1), **changes):
    names = ("codes", "scale", "zero_point")
    tensors = {**dict(zip(names, drawn_codes(IMAGES, 2, 0), strict=True)), **changes}
    return ops.conv2d_mixed(*tensors.values(), pack_blob(*small_layer(3)), *settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(IMAGES)}, "codes: torch.int8 expected, got torch.float32"),
        ({"codes": torch.zeros(5, 4, 8, dtype=torch.int8)}, r"codes \[B, H, W, C\] expected"),
        ({"codes": torch.zeros(2, 5, 4, 4, dtype=torch.int8)}, "3 and 8 channels; the call needs"),
        ({"settings": (12, 2, 1, 1)}, "kernel 2, stride 1, padding 1"),
        ({"settings": (12, 3, 3, 1)}, "kernel 3, stride 3"),
        ({"settings": (12, 3, 1, 2)}, "padding 2"),
        ({"settings": (12, 3, 1, 1, 3)}, "upsampling 3, not 1 or 2"),
        ({"settings": (16, 3, 1, 1)}, "a blob of 12 rows"),
        ({"settings": (12, 1, 1, 0)}, "a blob of 12 rows, kernel 3"),
        ({"codes": torch.zeros(2, 2, 4, 8, dtype=torch.int8), "settings": (12, 3, 1, 0)}, "2x4"),
        ({"scale": torch.ones(3), "zero_point": torch.zeros(3).int()}, "3 ranges for 2 samples"),
        ({"scale": torch.ones(4), "zero_point": torch.zeros(4).int()}, "4 ranges for 2 samples"),
        ({"scale": torch.ones(2, 1)}, "scale and zero_point: one each"),
        ({"scale": torch.ones(2).double()}, "scale: torch.float32 expected"),
        ({"zero_point": torch.zeros(2)}, "zero_point: torch.int32 expected"),
        ({"zero_point": torch.tensor([0, 128]).int()}, "outside -128..127"),
    ],
)
def test_a_wrong_convolution_is_refused_by_name(changes, message):
    convolved()
    with pytest.raises(ConfigError, match=message):
        convolved(**changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.quantize_mixed(x.double(), 1), "x: torch.float32 expected"),
        (lambda x: ops.quantize_mixed(x, 0), "into 0 equal parts"),
        (lambda x: ops.quantize_mixed(x, 7), "into 7 equal parts"),
        (lambda x: ops.quantize_mixed(x[:0], 1), r"\[0, 5, 4, 8\] cannot be cut"),
        (lambda x: ops.group_norm_mixed(x, *[x[0, 0, 0]] * 3, 3, 1e-5, False), "3 equal"),
        (lambda x: ops.group_norm_mixed(x[0], *[x[0, 0, 0]] * 3, 2, 1e-5, True), "B, H, W"),
        (
            lambda x: ops.group_norm_mixed(x, x[0, 0], *[x[0, 0, 0]] * 2, 2, 1e-5, True),
            r"weight \[8\] expected",
        ),
        (lambda x: ops.linear_mixed(*drawn_codes((6, 8), 4, 0), _blob(), 12), "do not cut 6 rows"),
        (lambda x: ops.linear_mixed(*drawn_codes((), 1, 0), _blob(), 12), "a single number"),
        (lambda x: ops.linear_mixed(*drawn_codes((6, 4), 6, 0), _blob(), 12), "needs 12, 1 and 4"),
    ],
)
def test_other_wrong_calls_are_refused_by_name(call, message):
    with pytest.raises(ConfigError, match=message):
        call(drawn_numbers(IMAGES, 0))


def _blob():
    return pack_blob(*small_layer())
