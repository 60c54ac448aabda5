"""The entropy coder in C++: the bytes, the codes and the refusals of the one in Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_package import kernels_installed, kernels_missing

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.fast_coder import installed_coder
from mpqdm_fx.numerics.levels.entropy_code import CodeClasses, decode, encode
from mpqdm_fx.numerics.levels.rans import TOP


def random_layer(rows, channels, places, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = 2 ** (6 * torch.rand(rows, 1, generator=generator)) - 1
    noise = torch.randn(rows, channels * places, generator=generator)
    return (noise * sizes).round().clamp(-TOP, TOP).to(torch.int8)


BAD_SIZES = 1  # CodesError of codes.h

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 9]))


def read(stream, shape, places):
    """Codes as Python reads them; None if it refuses the stream."""
    try:
        return decode(stream, shape, places)
    except ArtifactError:
        return None


def same(one, other):
    return one is other if one is None or other is None else torch.equal(one, other)


# sizes of one state, of several, and of vectors of them
@pytest.mark.parametrize("shape", [(3, 5, 1), (40, 60, 9), (100, 170, 9), (200, 170, 9)])
def test_both_write_and_read_the_same_bytes(native, shape):
    codes = random_layer(*shape)
    stream = encode(codes, shape[2])
    classes = CodeClasses.of(codes, shape[2]).of_weights().flatten().to(torch.uint8)
    words = native.encode_codes(codes.flatten(), classes)
    assert torch.equal(stream[-len(words) :], words)  # behind what tells the classes
    for kernels in native.kernel_sets:
        assert torch.equal(native.decode_codes(kernels, stream, *shape), codes)


@given(shape=shapes, seed=st.integers(0, 2**20), data=st.data())
def test_both_refuse_the_same_streams(native, shape, seed, data):
    rows, channels, places = shape
    stream = encode(random_layer(*shape, seed), places)
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream)))].clone()
    for _ in range(data.draw(st.integers(0, 2))):
        if len(stream):
            stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    expected = read(stream, (rows, channels * places), places)
    for kernels in native.kernel_sets:
        assert same(native.decode_codes(kernels, stream, *shape), expected)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (2**40, 2**30, 9)])
def test_sizes_that_no_layer_has_are_refused(native, shape):
    stream, codes = torch.zeros(64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int8)
    assert native.codes_error("scalar", stream, shape, codes) == BAD_SIZES


@pytest.mark.xnnpack
def test_the_installed_library_codes_and_refuses(tmp_path):
    codes = random_layer(20, 30, 9)
    with kernels_installed(tmp_path):
        installed_coder.cache_clear()
        coder = installed_coder()
        stream = encode(codes, 9, coder)
        assert torch.equal(stream, encode(codes, 9))
        assert torch.equal(decode(stream, (20, 270), 9, coder), codes)
        with pytest.raises(ArtifactError, match=r"codes: entropy-coded layer: .*; corrupted"):
            decode(stream[:-2], (20, 270), 9, coder)
    installed_coder.cache_clear()
    with kernels_missing():
        assert installed_coder() is None
    installed_coder.cache_clear()
