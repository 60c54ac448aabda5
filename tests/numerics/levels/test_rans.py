"""The entropy coder: exact, near the ideal length, and no damaged stream does harm."""

import contextlib
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.numerics.levels.entropy_code import code_lengths
from mpqdm_fx.numerics.levels.rans import (
    CLASSES,
    ESCAPE,
    TOP,
    TOTAL,
    class_frequencies,
    decode_run,
    encode_run,
    lanes_of,
)

TOOL = Path(__file__).parents[3] / "tools" / "entropy_tables.py"


def random_run(count, seed, spread=1.0):
    """Codes of random classes, about as large as these say: the tails are escaped."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (count,), generator=generator)
    deviations = 2 ** (classes / 3 - 4)
    codes = torch.randn(count, generator=generator) * deviations * spread
    return codes.round().clamp(-TOP, TOP).to(torch.int8), classes.to(torch.uint8)


runs = st.builds(
    random_run, st.integers(0, 300), st.integers(0, 2**20), st.sampled_from([0.0, 1.0, 3.0, 50.0])
)


def ideal_bits(codes, classes):
    return float(code_lengths().double()[classes.long(), codes.long() + TOP].sum())


@given(runs)
@example(random_run(2 * 8192, 1))  # two states
@example(random_run(4 * 8192 + 3, 2))  # four, and a last round that is not full
def test_what_is_decoded_is_what_was_encoded_and_no_longer_than_its_bits(run):
    codes, classes = run
    stream = encode_run(codes, classes)
    assert stream.dtype == torch.uint8
    assert torch.equal(decode_run(stream, classes), codes)
    # a state tells 0 to 16 bits of its 32; whole numbers of slots cost the rest
    lanes, ideal = lanes_of(len(codes)), ideal_bits(codes, classes)
    assert 16 * lanes - 1 <= 8 * len(stream) - ideal <= 32 * lanes + 1e-3 * ideal + 1


def test_the_bytes_are_the_same_everywhere():
    codes, classes = torch.arange(-120, 121, dtype=torch.int8), torch.arange(241) % CLASSES
    stream = encode_run(codes, classes.to(torch.uint8))
    digest = hashlib.sha256(bytes(stream.tolist())).hexdigest()
    assert (len(stream), digest[:16]) == (460, "86675e47e64eae09")


@given(runs, st.data())
def test_a_damaged_stream_is_refused_or_gives_codes(run, data):
    codes, classes = run
    stream = encode_run(codes, classes)
    if data.draw(st.booleans()):
        stream = stream[: data.draw(st.integers(0, len(stream) - 1))]
        with pytest.raises(ArtifactError, match="corrupted"):
            decode_run(stream, classes)
        return
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ArtifactError):
        decoded = decode_run(stream, classes)
        assert decoded.shape == codes.shape
        assert not bool((decoded == ESCAPE).any())
        assert not torch.equal(decoded, codes)


def test_states_take_turns_only_where_their_bytes_are_few():
    assert [lanes_of(count) for count in (0, 1, 16383, 16384, 2**18, 2**40)] == [1, 1, 1, 2, 32, 32]


def test_frequencies_of_a_class_fill_its_slots_and_are_the_same_for_both_signs():
    table = class_frequencies()
    assert table.shape == (CLASSES, 256)
    assert bool((table.sum(dim=1) == TOTAL).all())
    assert bool((table[:, 0] > 0).all())  # an escape
    assert bool((table >= 0).all())
    assert torch.equal(table[:, 1:], table[:, 1:].flip(1))


def test_the_tables_of_python_and_of_the_library_are_those_that_the_tool_writes():
    spec = importlib.util.spec_from_file_location("entropy_tables", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tables = json.loads(tool.TABLES.read_text())
    for place in (0, 11, 25, CLASSES - 1):
        assert tool.frequencies(place) == tables[place]
    assert tool.header(tables) == tool.HEADER.read_text()
