"""Whole numbers stored by how frequent they are: exact, of known size, refused if damaged."""

import contextlib
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels import entropy_code
from mpqdm_fx.numerics.levels.entropy_code import CodeClasses, code_lengths, decode, encode
from mpqdm_fx.numerics.levels.rans import TOP, encode_run


@st.composite
def layers(draw):
    """Codes of rows of all sizes, and the places of their kernel."""
    places = draw(st.sampled_from([1, 3, 9]))
    rows, channels = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    spread = draw(st.lists(st.floats(0, 7), min_size=rows, max_size=rows))
    noise = torch.randn(rows, channels * places, generator=generator)
    sizes = 2 ** torch.tensor(spread)[:, None] - 1
    return (noise * sizes).round().clamp(-TOP, TOP).to(torch.int8), places


@given(layers())
def test_what_is_read_is_what_was_written(layer):
    codes, places = layer
    stream = encode(codes, places)
    assert stream.dtype == torch.uint8
    assert torch.equal(decode(stream, tuple(codes.shape), places), codes)


@given(layers())
def test_a_stream_has_the_bits_that_its_classes_foretell(layer):
    codes, places = layer
    classes = CodeClasses.of(codes, places)
    bits = float(classes.bits(codes).sum()) + classes.header_bits
    # one state of four bytes, of which its codes get one or two
    assert 8 <= 8 * len(encode(codes, places)) - bits <= 48


@given(layers())
def test_fitted_classes_never_take_more_bits(layer):
    codes, places = layer
    classes = CodeClasses.of(codes, places)
    again = classes.fitted(codes)
    assert float(again.bits(codes).sum()) <= float(classes.bits(codes).sum()) + 1e-6


@given(layers(), st.data())
def test_a_damaged_stream_is_refused_or_gives_codes_of_the_layer(layer, data):
    codes, places = layer
    stream = encode(codes, places)
    damaged = stream[: data.draw(st.integers(0, len(stream) - 1))].clone()
    if len(damaged) and data.draw(st.booleans()):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    refused = contextlib.suppress(ArtifactError)
    with refused:
        result = decode(damaged, tuple(codes.shape), places)
        assert result.shape == codes.shape
        assert int(result.min()) >= -TOP


@given(layers())
def test_codes_that_are_looked_up_have_the_classes_of_those_that_are_counted(layer):
    codes, places = layer
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for cells in (0, 10**9):  # all are looked up, none is
            patch.setattr(entropy_code, "_LOOKED_UP", cells)
            found.append(CodeClasses.of(codes, places))
    for name in ("rows", "channels", "places"):
        assert torch.equal(getattr(found[0], name), getattr(found[1], name))


def test_a_column_of_70_000_codes_has_its_classes_in_a_moment():
    noise = 40 * torch.randn(70_000, 1, generator=torch.Generator().manual_seed(0))
    codes = noise.round().clamp(-TOP, TOP).to(torch.int8)
    start = time.process_time()
    CodeClasses.of(codes, 1)
    assert time.process_time() - start < 1  # counted it took 4 s, where it takes 0.01


def test_a_stream_that_is_cut_or_too_long_is_refused():
    codes = torch.arange(-40, 41, dtype=torch.int8).reshape(9, 9)
    stream = encode(codes, 1)
    for damaged in (stream[:3], stream[:-1], torch.cat([stream, torch.ones(4, dtype=torch.uint8)])):
        with pytest.raises(ArtifactError, match="corrupted"):
            decode(damaged, (9, 9), 1)


def test_a_code_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="one is -128"):
        encode(torch.tensor([[-128, 3]], dtype=torch.int8), 1)


def test_a_code_is_as_long_as_its_slots_or_those_of_the_escape_and_a_byte_say():
    lengths = code_lengths().double()
    assert torch.equal(lengths, lengths.flip(1))
    assert lengths[0, TOP] == pytest.approx(0.000352, abs=1e-6)
    assert lengths[0, TOP + 1] == 12 + 8
    # a code, for escapes that were told apart by their bytes would be one
    assert bool(((2**-lengths).sum(dim=1) <= 1 + 1e-6).all())


class FromPython:
    """A coder that only says that it was asked."""

    def __init__(self):
        self.asked = []

    def encode(self, codes, classes):
        self.asked.append("encode")
        return encode_run(codes, classes)

    def decode(self, stream, shape, places):
        self.asked.append("decode")
        return decode(stream, shape, places)


def test_a_coder_that_is_given_does_the_work():
    codes, coder = torch.arange(-40, 41, dtype=torch.int8).reshape(9, 9), FromPython()
    stream = encode(codes, 1, coder)
    assert torch.equal(decode(stream, (9, 9), 1, coder), codes)
    assert coder.asked == ["encode", "decode"]
    assert torch.equal(stream, encode(codes, 1))


def test_nothing_is_made_of_a_size_that_a_stream_cannot_have():
    with pytest.raises(ArtifactError, match="ends too early"):
        decode(torch.zeros(100, dtype=torch.uint8), (2**40, 2**20), 1)
