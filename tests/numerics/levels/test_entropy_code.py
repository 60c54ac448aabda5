"""Whole numbers stored by how frequent they are: exact, of known size, refused if damaged."""

import builtins
import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels import entropy_code
from mpqdm_fx.numerics.levels.entropy_code import CLASSES, TOP, CodeClasses, decode, encode

TOOL = Path(__file__).parents[3] / "tools" / "entropy_tables.py"


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
    # the coder ends on a word, and starts with one or two
    assert -16 <= 8 * len(encode(codes, places)) - bits <= 120


@given(layers())
def test_fitted_classes_never_take_more_bits(layer):
    codes, places = layer
    classes = CodeClasses.of(codes, places)
    again = classes.fitted(codes)
    assert float(again.bits(codes).sum()) <= float(classes.bits(codes).sum()) + 1e-6


def test_frequencies_of_a_class_are_a_code():
    lengths = entropy_code.code_lengths().double()
    assert lengths.shape == (CLASSES, 2 * TOP + 1)
    torch.testing.assert_close((2**-lengths).sum(dim=1), torch.ones(CLASSES).double())
    assert torch.equal(lengths, lengths.flip(1))


def test_the_tables_are_those_that_the_tool_writes():
    spec = importlib.util.spec_from_file_location("entropy_tables", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    table = entropy_code._frequencies()[:, TOP:]
    for place in (0, 11, 25, CLASSES - 1):
        assert tool.frequencies(place) == table[place].tolist()


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


def test_a_stream_that_is_cut_or_too_long_is_refused():
    codes = torch.arange(-40, 41, dtype=torch.int8).reshape(9, 9)
    stream = encode(codes, 1)
    for damaged in (stream[:3], stream[:-1], torch.cat([stream, torch.ones(4, dtype=torch.uint8)])):
        with pytest.raises(ArtifactError, match="corrupted"):
            decode(damaged, (9, 9), 1)


def test_a_code_that_there_is_not_is_refused():
    with pytest.raises(ConfigError, match="one is -128"):
        encode(torch.tensor([[-128, 3]], dtype=torch.int8), 1)


def test_without_the_library_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "constriction":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'mpqdm-fx\[entropy\]'"):
        encode(torch.ones(2, 2, dtype=torch.int8), 1)
