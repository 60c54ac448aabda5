"""The fixed parts of a weight blob: header, entries, offsets, checksum (native/FORMAT.md)."""

import struct
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpqdm_fx.backends.lowbit.encodings import BLOCK_ROWS, KINDS, Blocks
from mpqdm_fx.backends.lowbit.tiles import TILE_DEPTH, tile_count
from mpqdm_fx.errors import ConfigError, LoweringError

__all__ = [
    "ALIGNMENT",
    "ENTRY",
    "HAS_BIAS",
    "HEADER_BYTES",
    "MAGIC",
    "VERSION",
    "Header",
    "Layout",
    "Offsets",
    "Sections",
    "WeightShape",
    "checksum",
    "lay_out",
    "named_offsets",
]

MAGIC = 0x4C51504D
VERSION = 1
HEADER_BYTES = 128
ALIGNMENT = 64
_GROUP_DEPTH = 4
_MAX_ROWS = 1 << 20
_MAX_DEPTH = 1 << 16  # depth * 255 * 128 stays below 2^31: sums are exact in int32
_KERNELS = (1, 3)
HAS_BIAS = 1  # bit of the header's flags
_HEADER = struct.Struct("<IHHQQIIIIIIQQQQ")
_Size = TypeVar("_Size", int, NDArray[np.int64])

#: An entry of the block table.
ENTRY = np.dtype(
    [
        ("codes_at", "<u8"),
        ("tables_at", "<u4"),
        ("kind", "u1"),
        ("bits", "u1"),
        ("largest", "u1"),
        ("zero", "u1"),
    ]
)


class WeightShape(NamedTuple):
    """The shape of a layer's weights.

    Attributes:
        rows: Output channels.
        channels: Input channels.
        kernel: Height and width of the kernel; 1 for a linear layer.
    """

    rows: int
    channels: int
    kernel: int

    @property
    def depth(self) -> int:
        """Weights a row."""
        return self.kernel * self.kernel * self.channels

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "WeightShape":
        """Of a weight [rows, depth] or [rows, channels, height, width].

        Raises:
            ConfigError: The shape is neither.
            LoweringError: The format has no such layer.
        """
        if len(shape) not in (2, 4) or 0 in shape:
            raise ConfigError(
                f"a weight blob takes codes [rows, depth] or [rows, channels, height, width], "
                f"got {list(shape)}"
            )
        height, width = shape[2:] or (1, 1)
        result = cls(shape[0], shape[1], height)
        if height != width or height not in _KERNELS:
            raise LoweringError(
                f"low-bit kernels have 1x1 and 3x3 convolutions, not {height}x{width}; keep this "
                "layer in XNNPACK"
            )
        if fault := result.fault():
            raise LoweringError(f"low-bit kernels cannot run this layer: {fault}")
        return result

    def fault(self) -> str | None:
        """Why the format has no such layer; None if it has."""
        if not 1 <= self.rows <= _MAX_ROWS:
            return f"{self.rows} output channels, not 1 to {_MAX_ROWS}"
        if self.kernel not in _KERNELS:
            return f"a kernel of {self.kernel}, not 1 or 3"
        if not self.channels or self.channels % _GROUP_DEPTH:
            return f"{self.channels} input channels, no multiple of {_GROUP_DEPTH}"
        if self.depth > _MAX_DEPTH:
            return f"{self.depth} weights a row, more than {_MAX_DEPTH}"
        return None


class Header(NamedTuple):
    """The first 80 bytes of a blob; 48 zeros follow."""

    magic: int
    version: int
    header_bytes: int
    blob_bytes: int
    checksum: int
    rows: int
    depth: int
    channels: int
    kernel: int
    blocks: int
    flags: int
    order_at: int
    block_at: int
    scale_at: int
    bias_at: int

    def pack(self) -> bytes:
        """The 128 bytes."""
        return _HEADER.pack(*self).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, octets: bytes) -> "Header":
        """Read 128 bytes; nothing is checked."""
        return cls._make(_HEADER.unpack(octets[: _HEADER.size]))

    @property
    def shape(self) -> WeightShape:
        """Of the weights."""
        return WeightShape(self.rows, self.channels, self.kernel)

    @property
    def named(self) -> "Offsets":
        """Where sections begin."""
        return Offsets(self.order_at, self.block_at, self.scale_at, self.bias_at)


class Sections(NamedTuple):
    """Bytes of a blob by what they hold.

    Attributes:
        header: 128.
        order: Output channels of the rows.
        blocks: The block table.
        scale: float32 scales.
        bias: float32 biases; 0 without.
        tables: Levels of table blocks.
        codes: Bit planes.
        padding: Zeros between sections.
    """

    header: int
    order: int
    blocks: int
    scale: int
    bias: int
    tables: int
    codes: int
    padding: int


class Offsets(NamedTuple):
    """Where the sections begin that the header names; they follow it in this order.

    Attributes:
        order_at: Order of rows.
        block_at: Block table.
        scale_at: Scales.
        bias_at: Biases; 0 without.
    """

    order_at: int
    block_at: int
    scale_at: int
    bias_at: int


class Layout(NamedTuple):
    """Where everything in a blob begins.

    Attributes:
        named: Sections that the header names.
        tables_at: int64 [blocks], 0 for blocks without a table.
        codes_at: int64 [blocks].
        blob_bytes: Of the whole blob.
    """

    named: Offsets
    tables_at: NDArray[np.int64]
    codes_at: NDArray[np.int64]
    blob_bytes: int


def named_offsets(rows: int, *, bias: bool) -> tuple[Offsets, int]:
    """Place the sections that the header names.

    Args:
        rows: Output channels.
        bias: Whether there is a bias.

    Returns:
        Where they begin, and where the last of them ends, all multiples of 64.
    """
    blocks = -(-rows // BLOCK_ROWS)
    block_at = HEADER_BYTES + _aligned(4 * BLOCK_ROWS * blocks)
    scale_at = block_at + _aligned(ENTRY.itemsize * blocks)
    bias_at = scale_at + _aligned(4 * rows)
    if not bias:
        return Offsets(HEADER_BYTES, block_at, scale_at, 0), bias_at
    return Offsets(HEADER_BYTES, block_at, scale_at, bias_at), bias_at + _aligned(4 * rows)


def lay_out(blocks: Blocks, depth: int, *, bias: bool) -> Layout:
    """Place the sections, then the tables, then the codes.

    Args:
        blocks: Rows by block.
        depth: Weights a row.
        bias: Whether there is a bias.

    Returns:
        Offsets, multiples of 64.
    """
    named, behind = named_offsets(blocks.rows, bias=bias)
    has_table = blocks.kinds == KINDS.index("table")
    table_sizes = np.where(has_table, _aligned(BLOCK_ROWS << blocks.bits), 0)
    code_sizes = _aligned(tile_count(depth) * TILE_DEPTH * blocks.bits)
    sizes = np.concatenate([table_sizes, code_sizes])
    ends = behind + np.cumsum(sizes)
    tables_at, codes_at = np.split(ends - sizes, 2)
    return Layout(named, np.where(has_table, tables_at, 0), codes_at, int(ends[-1]))


def _aligned(size: _Size) -> _Size:
    return -(-size // ALIGNMENT) * ALIGNMENT


def checksum(octets: NDArray[np.uint8]) -> int:
    """Checksum of the bytes behind the header.

    Args:
        octets: uint8, a multiple of 8 of them.
    """
    words = np.ascontiguousarray(octets).view("<u8").astype(np.uint64)
    multipliers = np.arange(len(words), dtype=np.uint64)
    multipliers *= np.uint64(0x9E3779B97F4A7C15)
    multipliers += np.uint64(0xD1B54A32D192ED03)
    multipliers |= np.uint64(1)
    words ^= words >> np.uint64(32)
    words *= multipliers
    return int(words.sum(dtype=np.uint64))
