"""The C++ kernels give the integers of int64 sums and the float results of the torch reference."""

import itertools

import pytest
import torch
from blob_rows import CLASSES, flat_rows, layers, make_row
from hypothesis import given
from hypothesis import strategies as st

import mpqdm_fx.backends.lowbit.ops  # noqa: F401  (registers the reference)
from mpqdm_fx.backends.lowbit.blob import pack_blob

ops = torch.ops.mpqdm


def drawn_images(shape, parts, seed):
    """Codes over all of int8, with ranges of `parts` parts."""
    source = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, shape, generator=source).to(torch.int8)
    zero_point = torch.randint(-128, 128, (parts,), generator=source).to(torch.int32)
    return codes, torch.rand(parts, generator=source) + 1e-3, zero_point


def exact_sums(images, kernels, stride, padding):
    """int64 [B, Ho, Wo, rows] of codes less zero points and kernels [rows, C, k, k], tap by tap."""
    codes, _, zero_point = images
    numbers = codes.to(torch.int64).reshape(len(zero_point), -1) - zero_point[:, None]
    padded = torch.nn.functional.pad(
        numbers.reshape(codes.shape), (0, 0, padding, padding, padding, padding)
    )
    size = kernels.shape[2]
    height = (padded.shape[1] - size) // stride + 1
    width = (padded.shape[2] - size) // stride + 1
    sums = torch.zeros(len(codes), height, width, len(kernels), dtype=torch.int64)
    for y in range(size):
        for x in range(size):
            rows = slice(y, y + stride * (height - 1) + 1, stride)
            columns = slice(x, x + stride * (width - 1) + 1, stride)
            taps = kernels[:, :, y, x].to(torch.int64)
            sums += (padded[:, rows, columns, None, :] * taps).sum(-1)
    return sums


def repeated(images, times):
    """Codes with each pixel `times` times in both directions, on their ranges."""
    codes, *ranges = images
    return codes.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2), *ranges


def assert_exact(native, layer, images, stride=1, padding=0, upsampling=1, threads=1):
    """All kernel sets of this CPU give the integers, and the results of the reference."""
    codes, scale, bias = layer
    kernels = codes if codes.ndim == 4 else codes[:, :, None, None]
    blob = pack_blob(codes, scale, bias)
    integers = exact_sums(repeated(images, upsampling), kernels, stride, padding)
    assert integers.abs().max() < 2**31
    how = (stride, padding, upsampling)
    results = ops.conv2d_mixed(*images, blob, len(kernels), kernels.shape[2], *how)
    for name in native.kernel_sets:
        got = native.convolve(name, blob, images, results.shape, *how, threads=threads)
        assert torch.equal(got[1].to(torch.int64), integers), f"integers of {name}"
        assert torch.equal(got[0], results), f"results of {name}"


@given(
    layer=layers(max_rows=24, max_groups=8),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    stride=st.sampled_from([1, 2]),
    padded=st.booleans(),
    one_range=st.booleans(),
    upsampling=st.sampled_from([1, 2]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_convolutions(
    native, layer, batch, size, stride, padded, one_range, upsampling, threads, seed
):
    codes = layer[0]
    kernel, channels = (codes.shape[2], codes.shape[1]) if codes.ndim == 4 else (1, codes.shape[1])
    padding = kernel // 2 if padded or min(size) < kernel else 0
    images = drawn_images((batch, *size, channels), 1 if one_range else batch, seed)
    assert_exact(native, layer, images, stride, padding, upsampling, threads)


@given(
    layer=layers(max_rows=24, max_groups=8, kernels=(1,)),
    rows=st.sampled_from([(1, 1), (6, 3), (12, 12), (17, 17), (64, 1)]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_linear_layers_with_ranges_of_rows(native, layer, rows, threads, seed):
    count, parts = rows
    images = drawn_images((1, 1, count, layer[0].shape[1]), parts, seed)
    assert_exact(native, layer, images, threads=threads)


@pytest.mark.parametrize(("kind", "bits"), CLASSES)
def test_every_encoding_unpacks_and_multiplies(native, kind, bits):
    generator = torch.Generator().manual_seed(bits)
    rows = torch.stack([make_row(kind, bits, 9 * 20, generator) for _ in range(19)])
    codes = rows.reshape(19, 20, 3, 3)
    blob = pack_blob(codes, torch.ones(19))
    assert torch.equal(native.unpack(blob, 19, 180), flat_rows(codes))
    assert_exact(native, (codes, torch.ones(19), None), drawn_images((1, 4, 5, 20), 1, 0), 1, 1)


@given(layer=layers())
def test_all_rows_of_a_blob_unpack(native, layer):
    rows = flat_rows(layer[0])
    assert native.blob_error(pack_blob(*layer)) is None
    assert torch.equal(native.unpack(pack_blob(*layer), *rows.shape), rows)


def test_every_zero_point(native):
    source = torch.Generator().manual_seed(0)
    rows = torch.stack([make_row(*CLASSES[i % len(CLASSES)], 52, source) for i in range(24)])
    codes, scale, _ = drawn_images((1, 1, 256, 52), 256, 0)
    images = (codes, scale, torch.arange(-128, 128, dtype=torch.int32))
    assert_exact(native, (rows, torch.ones(24), None), images)


@pytest.mark.parametrize(
    "level", [-128, -127, 127, -64, 63, -15, 15, -8, 7, -7, 3, -2, 1], ids=lambda level: f"w{level}"
)
def test_the_ends_of_all_ranges_at_the_greatest_depth(native, level):
    blob = pack_blob(torch.full((9, 65536), level, dtype=torch.int8), torch.ones(9))
    for code, zero_point in itertools.product([-128, 127], [-128, 127]):
        images = (
            torch.full((1, 1, 5, 65536), code, dtype=torch.int8),
            torch.ones(1),
            torch.tensor([zero_point], dtype=torch.int32),
        )
        expected = 65536 * level * (code - zero_point)
        for name in native.kernel_sets:
            _, integers = native.convolve(name, blob, images, (1, 1, 5, 9))
            assert (integers == expected).all(), (name, code, zero_point)


def test_a_range_of_nan_gives_nan_where_it_belongs(native):
    rows = torch.ones(3, 8, dtype=torch.int8)
    codes, scale, zero_point = drawn_images((1, 1, 4, 8), 4, 0)
    scale[2] = torch.nan
    for name in native.kernel_sets:
        images = (codes, scale, zero_point)
        results, _ = native.convolve(name, pack_blob(rows, torch.ones(3)), images, (1, 1, 4, 3))
        assert results.isnan().any(-1).flatten().tolist() == [False, False, True, False], name
        assert results[0, 0, 2].isnan().all()
