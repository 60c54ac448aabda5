"""Weights packed at their own widths come back exactly, in the bytes that FORMAT.md says."""

import struct

import pytest
import torch
from blob_rows import (
    CLASSES,
    checksum,
    code_rows,
    entry_of,
    field,
    flat_rows,
    layers,
    make_row,
    narrowest,
    read_code,
)
from hypothesis import example, given
from hypothesis import strategies as st

from mpqdm_fx.backends.lowbit.blob import blob_bytes, pack_blob, unpack_blob
from mpqdm_fx.errors import ConfigError, LoweringError

FILL = 0xFFFFFFFF
# Rows of a byte that the joining of blocks may cost beyond the widths of the rows: 8 for what the
# blocks' widest rows exceed the others by, 9 for encodings that hold several kinds of rows.
JOINING_ROWS = 17


def every_class(rows=9, depth=36):
    """Rows of every class, one more than a block."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [make_row(kind, bits, depth, generator) for kind, bits in CLASSES for _ in range(rows)]
    )


def order_of(blob):
    at, slots = field(blob, 48, "Q"), 8 * field(blob, 40)
    return list(struct.unpack_from(f"<{slots}I", blob.numpy().tobytes(), at))


@given(layer=layers())
@example(layer=(every_class(), torch.ones(171), None))
@example(layer=(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1), torch.zeros(1)))
def test_a_blob_gives_codes_scales_and_biases_back(layer):
    codes, scale, bias = layer
    content = unpack_blob(pack_blob(codes, scale, bias))
    assert torch.equal(content.codes, flat_rows(codes))
    assert torch.equal(content.scale, scale)
    assert bias is None if content.bias is None else torch.equal(content.bias, bias)
    assert (content.kernel, content.channels) == ((*codes.shape, 1)[2], codes.shape[1])


@given(codes=code_rows(max_rows=20, max_groups=3), data=st.data())
@example(codes=every_class(depth=40), data=None)
def test_every_code_lies_where_the_format_says(codes, data):
    blob, rows = pack_blob(codes, torch.ones(len(codes))), flat_rows(codes)
    for slot, channel in enumerate(order_of(blob)):
        if channel != FILL:
            column = data.draw(st.integers(0, rows.shape[1] - 1)) if data else slot % 40
            assert read_code(blob, slot // 8, slot % 8, column) == rows[channel, column]


def test_a_small_blob_has_these_bytes():
    codes = torch.tensor([[-1, 1, 1, -1]], dtype=torch.int8)
    data = pack_blob(codes, torch.tensor([0.5]), torch.tensor([-2.0])).numpy().tobytes()
    behind = b"".join(
        part.ljust(64, b"\0")
        for part in (
            struct.pack("<8I", 0, *[FILL] * 7),
            struct.pack("<QIBBBB", 384, 0, 0, 1, 1, 0),
            struct.pack("<f", 0.5),
            struct.pack("<f", -2.0),
            bytes([0, 1, 1, 0] * 8),  # rows of no channel repeat the last
        )
    )
    header = struct.pack("<4sHHQQ", b"MPQL", 1, 128, 448, checksum(behind))
    header += struct.pack("<6I4Q", 1, 4, 4, 1, 1, 1, 128, 192, 256, 320)
    assert data == header.ljust(128, b"\0") + behind


@given(codes=code_rows())
@example(codes=every_class())
def test_blocks_have_the_narrowest_encoding_that_holds_their_rows(codes):
    blob, rows = pack_blob(codes, torch.ones(len(codes))), flat_rows(codes)
    order = order_of(blob)
    assert sorted(order[: len(rows)]) == list(range(len(rows)))
    assert set(order[len(rows) :]) <= {FILL}
    content = unpack_blob(blob)
    for block, encoding in enumerate(content.blocks):
        members = rows[[row for row in order[8 * block : 8 * block + 8] if row != FILL]]
        assert (encoding.bits, encoding.kind) == narrowest(members)
        _, _, kind, bits, largest = entry_of(blob, block)
        assert (kind, bits) == encoding
        levels = {"odd": 2**bits - 1, "integer": 2 ** (bits - 1)}
        assert largest == levels.get(kind, int(members.to(torch.int16).abs().max()))


@given(codes=code_rows(max_rows=30))
@example(codes=every_class())
def test_a_blob_is_hardly_longer_than_the_sum_of_its_widths(codes):
    content = unpack_blob(pack_blob(codes, torch.ones(len(codes))))
    widths = sum(narrowest(row[None])[0] for row in flat_rows(codes))
    tiles, blocks = -(-content.codes.shape[1] // 32), len(content.blocks)
    assert content.sections.codes <= 4 * tiles * (widths + 8 * JOINING_ROWS)
    rest = sum(content.sections) - content.sections.codes
    assert rest <= 128 + 4 * len(codes) + blocks * (32 + 16 + 128 + 48) + 4 * 63


def test_whole_blocks_cost_the_width_of_their_rows_and_no_more():
    generator = torch.Generator().manual_seed(1)
    for kind, bits in CLASSES:
        rows = [make_row(kind, bits, 64, generator) for _ in range(16)]
        content = unpack_blob(pack_blob(torch.stack(rows), torch.ones(16)))
        expected = [narrowest(row[None])[0] for row in rows]
        assert expected == [bits] * 16
        assert content.sections.codes == 16 * 64 * bits // 8


def packed_bits(*members, depth=64):
    """Bits of each block of a layer of these classes."""
    source = torch.Generator().manual_seed(2)
    codes = torch.stack([make_row(kind, bits, depth, source) for kind, bits in members])
    return [block.bits for block in unpack_blob(pack_blob(codes, torch.ones(len(codes)))).blocks]


def test_rows_of_one_encoding_find_each_other():
    assert packed_bits(*[("odd", 6), ("integer", 6)] * 8) == [6, 6]


def test_rows_left_over_are_joined_from_the_widest_on():
    assert packed_bits(*[("odd", 1)] * 5, *[("integer", 6)] * 4) == [6, 1]
    assert packed_bits(*[("odd", 6)] * 4, *[("integer", 6)] * 4) == [7]
    assert packed_bits(*[("table", 4)] * 4, *[("integer", 7)] * 4) == [8]
    assert packed_bits(*[("table", 4)] * 4, *[("odd", 2)] * 4) == [4]


@given(layer=layers())
def test_bytes_are_counted_without_a_blob(layer):
    blob = pack_blob(*layer)
    assert blob_bytes(layer[0], bias=layer[2] is not None) == len(blob) == field(blob, 8, "Q")
    assert sum(unpack_blob(blob).sections) == len(blob)
    assert len(blob) % 64 == 0


def test_a_table_holds_distinct_values_and_repeats_the_largest():
    codes = torch.tensor([[-128, 5, 100, 5]] * 8, dtype=torch.int8)
    blob = pack_blob(codes, torch.ones(8))
    _, at, kind, bits, largest = entry_of(blob, 0)
    assert (kind, bits, largest) == ("table", 2, 128)
    assert blob[at : at + 32].view(torch.int8).tolist() == [-128, 5, 100, 100] * 8


def test_a_view_packs_as_its_copy():
    codes = every_class()[::3].t().contiguous().t()
    scale = torch.arange(1, 2 * len(codes) + 1).float()[::2]
    assert torch.equal(pack_blob(codes, scale), pack_blob(codes.contiguous(), scale.clone()))


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("codes", "scale", "bias", "error", "message"),
    [
        (torch.zeros(2, 4), ONES, None, ConfigError, "int8 codes, got torch.float32"),
        (torch.zeros(2, 4, 3, dtype=torch.int8), ONES, None, ConfigError, r"got \[2, 4, 3\]"),
        (torch.zeros(0, 4, dtype=torch.int8), ONES, None, ConfigError, r"got \[0, 4\]"),
        (torch.zeros(2, 6, dtype=torch.int8), ONES, None, LoweringError, "6 input channels"),
        (torch.zeros(2, 6, 3, 3, dtype=torch.int8), ONES, None, LoweringError, "6 input"),
        (torch.zeros(2, 4, 5, 5, dtype=torch.int8), ONES, None, LoweringError, "not 5x5"),
        (torch.zeros(2, 4, 1, 3, dtype=torch.int8), ONES, None, LoweringError, "not 1x3"),
        (torch.zeros(2, 65540, dtype=torch.int8), ONES, None, LoweringError, "65540 weights"),
        (torch.zeros(2, 4, dtype=torch.int8), ONES.double(), None, ConfigError, "scale: float32"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.ones(3), None, ConfigError, r"scale: .*\[3\]"),
        (torch.zeros(2, 4, dtype=torch.int8), 0 * ONES, None, ConfigError, "must be positive"),
        (torch.zeros(2, 4, dtype=torch.int8), ONES / 0, None, ConfigError, "scale: .*infinite"),
        (torch.zeros(2, 4, dtype=torch.int8), ONES, ONES.half(), ConfigError, "bias: float32"),
        (torch.zeros(2, 4, dtype=torch.int8), ONES, ONES * torch.nan, ConfigError, "bias: .*NaN"),
    ],
)
def test_what_cannot_be_packed_is_named(codes, scale, bias, error, message):
    with pytest.raises(error, match=message):
        pack_blob(codes, scale, bias)
