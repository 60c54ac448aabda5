"""Rows of int8 codes for weight blobs, and a reader written from native/FORMAT.md alone."""

import struct

import torch
from hypothesis import strategies as st

CLASSES = (
    *(("odd", bits) for bits in range(1, 8)),
    *(("integer", bits) for bits in range(1, 8)),
    *(("table", bits) for bits in range(1, 5)),
    ("byte", 8),
)
KINDS = ("odd", "integer", "table", "byte")
WORD = (1 << 64) - 1


def make_row(kind, bits, depth, generator):
    """Codes drawn from the levels of an encoding, at random over all of them or over few."""
    if kind == "odd":
        levels = torch.arange(2**bits) * 2 - (2**bits - 1)
    elif kind == "integer":
        levels = torch.arange(2**bits) - 2 ** (bits - 1)
    elif kind == "table":
        levels = torch.randperm(256, generator=generator)[: 2**bits] - 128
    else:
        levels = torch.arange(256) - 128
    return levels[torch.randint(len(levels), (depth,), generator=generator)].to(torch.int8)


@st.composite
def code_rows(draw, max_rows=40, kernels=(1, 3), max_groups=12):
    """Draw int8 codes [rows, channels] or [rows, channels, kernel, kernel] of classes mixed."""
    kernel = draw(st.sampled_from(kernels))
    channels = 4 * draw(st.integers(1, max_groups))
    classes = draw(st.lists(st.sampled_from(CLASSES), min_size=1, max_size=4, unique=True))
    members = draw(st.lists(st.sampled_from(classes), min_size=1, max_size=max_rows))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = [make_row(kind, bits, kernel**2 * channels, generator) for kind, bits in members]
    codes = torch.stack(rows)
    return codes if kernel == 1 else codes.reshape(len(codes), channels, kernel, kernel)


@st.composite
def layers(draw, **settings):
    """Draw codes, scales and, or not, biases."""
    codes = draw(code_rows(**settings))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = torch.rand(len(codes), generator=generator) + 1e-3
    bias = torch.randn(len(codes), generator=generator) if draw(st.booleans()) else None
    return codes, scale, bias


def flat_rows(codes):
    """Codes [rows, depth] in the order (kernel row, kernel column, channel)."""
    return (codes if codes.ndim == 2 else codes.permute(0, 2, 3, 1)).reshape(len(codes), -1)


def narrowest(rows):
    """(bits, kind) of the narrowest encoding that holds all rows, tried one by one."""
    values = [set(row) for row in rows.tolist()]
    together = set().union(*values)
    for bits in range(1, 8):
        if together <= {2 * code - (2**bits - 1) for code in range(2**bits)}:
            return bits, "odd"
        if together <= {code - 2 ** (bits - 1) for code in range(2**bits)}:
            return bits, "integer"
        if bits <= 4 and all(len(row) <= 2**bits for row in values):
            return bits, "table"
    return 8, "byte"


def checksum(data):
    """Of the bytes behind the header, word by word."""
    total = 0
    for index, (word,) in enumerate(struct.iter_unpack("<Q", data)):
        multiplier = (index * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & WORD | 1
        total += (word ^ word >> 32) * multiplier
    return total & WORD


def sealed(blob):
    """The blob with the checksum of what it holds."""
    data = bytearray(blob.numpy().tobytes())
    struct.pack_into("<Q", data, 16, checksum(data[128:]))
    return torch.frombuffer(data, dtype=torch.uint8)


def field(blob, at, kind="I"):
    """A number of the blob."""
    return struct.unpack_from(f"<{kind}", blob.numpy().tobytes(), at)[0]


def with_field(blob, at, value, kind="I"):
    """The blob with another number in it."""
    data = bytearray(blob.numpy().tobytes())
    struct.pack_into(f"<{kind}", data, at, value)
    return torch.frombuffer(data, dtype=torch.uint8)


def entry_of(blob, block):
    """(codes_at, tables_at in bytes, kind, bits, largest) of a block."""
    at = field(blob, 56, "Q") + 16 * block
    codes_at, tables_at, kind, bits, largest, zero = struct.unpack_from(
        "<QIBBBB", blob.numpy().tobytes(), at
    )
    assert zero == 0
    return codes_at, 64 * tables_at, KINDS[kind], bits, largest


def read_code(blob, block, row, index):
    """The int8 that one code stands for, bit by bit."""
    data = blob.numpy()
    codes_at, tables_at, kind, bits, _ = entry_of(blob, block)
    group, lane = index % 32 // 4, 4 * row + index % 4
    tile = codes_at + 32 * bits * (index // 32)
    if kind == "byte":
        value = int(data[tile + 32 * group + lane])
        return value - 256 if value > 127 else value
    code = shift = 0
    for plane in (4, 2, 1):
        if bits & plane:
            octet = int(data[tile + 32 * (group % plane) + lane])
            code |= (octet >> plane * (group // plane) & 2**plane - 1) << shift
            tile, shift = tile + 32 * plane, shift + plane
    if kind == "table":
        value = int(data[tables_at + (row << bits) + code])
        return value - 256 if value > 127 else value
    return 2 * code - (2**bits - 1) if kind == "odd" else code - 2 ** (bits - 1)
