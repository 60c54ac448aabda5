"""Exact packing of codes at their own widths, and back.

The stored integer of a code is the index of its level (levels ascending) in ``b`` bits, little
endian: bit 0 of a stream is the lowest bit of its first byte. A layer is one bit stream without
gaps: channels of equal width stand together, narrowest width first, in channel order, and the codes
of a channel follow each other. At most 7 zero bits pad the last byte.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels.codebook import LevelKind, codebook_tables
from mpqdm_fx.numerics.levels.grids import MAX_BITS, check_bits
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS

__all__ = [
    "SCALE_BITS",
    "WIDTH_BITS",
    "PackedLayer",
    "StorageBits",
    "coded_bits",
    "pack_bits",
    "pack_layer",
    "storage_bits",
    "unpack_bits",
    "unpack_layer",
]

SCALE_BITS = 16
WIDTH_BITS = 3  # a width 1..8 is stored as width - 1
_CHUNK = 1 << 21  # values packed at once; a multiple of 8, so chunks meet at byte boundaries


class PackedLayer(NamedTuple):
    """The codes of one layer as bytes.

    Attributes:
        stream: uint8, the codes' bit stream.
        widths: uint8, ``width - 1`` of each channel in 3 bits; empty if all widths are equal.
        tables: int8, for each codebook channel (at most 4 bits), in channel order, its ``2^b``
            values ascending, the largest repeated where there are fewer; empty for uniform levels.
    """

    stream: Tensor
    widths: Tensor
    tables: Tensor


class StorageBits(NamedTuple):
    """Stored bits of one layer, whole bytes each: ``8 * len()`` of the parts of `PackedLayer`.

    Attributes:
        codes: The bit stream.
        scales: 16 a channel.
        tables: Codebook values.
        widths: Width tags.
    """

    codes: int
    scales: int
    tables: int
    widths: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def coded_bits(channels: int, coded: int) -> StorageBits:
    """What an entropy-coded layer stores: its bytes, and its scales.

    Args:
        channels: Output channels.
        coded: Bytes of the codes and of what tells their classes (`entropy_code.encode`).
    """
    return StorageBits(codes=8 * coded, scales=SCALE_BITS * channels, tables=0, widths=0)


def storage_bits(shape: tuple[int, int], bits: Tensor, levels: LevelKind) -> StorageBits:
    """Count what `pack_layer` stores for a layer, and its scales.

    Args:
        shape: (channels, weights a channel).
        bits: int64 [O], 1 to 8 each.
        levels: ``"uniform"``, ``"codebook"`` or ``"int4"``.

    Returns:
        Bits by kind.

    Raises:
        ConfigError: ``bits`` do not fit the shape or lie outside 1..8.
    """
    channels, width = shape
    widths = check_bits(bits, channels)
    mixed = bool((widths != widths[0]).any()) if channels else False
    tables = 2 ** widths[LEVEL_SETS[levels].stored(widths)]
    return StorageBits(
        codes=8 * _bytes(int(widths.sum()) * width),
        scales=SCALE_BITS * channels,
        tables=8 * int(tables.sum()),
        widths=8 * _bytes(WIDTH_BITS * channels) if mixed else 0,
    )


def pack_bits(values: Tensor, width: int) -> Tensor:
    """Pack integers at ``width`` bits each.

    Args:
        values: Integers ``0 .. 2^width - 1``, any integer dtype, taken flat.
        width: 1 to 8.

    Returns:
        uint8 [ceil(n * width / 8)]; the padding bits are zero.

    Raises:
        ConfigError: ``width`` outside 1..8, or a value that does not fit.
    """
    _check_width(width)
    flat = values.flatten()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < 2**width:
        raise ConfigError(f"values {int(flat.min())}..{int(flat.max())} do not fit {width} bits")
    parts = []
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        padded = torch.nn.functional.pad(part, (0, -len(part) % 8)).view(-1, 8)
        word = torch.zeros(len(padded), dtype=torch.int64, device=flat.device)
        for lane in range(8):  # eight values fill exactly ``width`` bytes
            word |= padded[:, lane].to(torch.int64) << (lane * width)
        shifts = torch.arange(0, 8 * width, 8, device=flat.device)
        octets = (word[:, None] >> shifts).bitwise_and_(255).to(torch.uint8)
        parts.append(octets.flatten()[: _bytes(len(part) * width)])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=flat.device)


def unpack_bits(stream: Tensor, width: int, count: int) -> Tensor:
    """Invert `pack_bits`.

    Args:
        stream: uint8 [ceil(count * width / 8)].
        width: 1 to 8.
        count: How many integers.

    Returns:
        uint8 [count].

    Raises:
        ConfigError: ``width`` outside 1..8.
        ArtifactError: The stream is truncated, too long, or its padding is not zero.
    """
    _check_width(width)
    _check_stream(stream, count * width, "stream of packed integers")
    parts = []
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        first = start * width // 8
        octets = stream[first : first + _bytes(size * width)]
        padded = torch.nn.functional.pad(octets, (0, -len(octets) % width)).view(-1, width)
        word = torch.zeros(len(padded), dtype=torch.int64, device=stream.device)
        for lane in range(width):
            word |= padded[:, lane].to(torch.int64) << (8 * lane)
        shifts = torch.arange(0, 8 * width, width, device=stream.device)
        values = (word[:, None] >> shifts).bitwise_and_(2**width - 1).to(torch.uint8)
        parts.append(values.flatten()[:size])
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=stream.device)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_BITS:
        raise ConfigError(f"packing needs a width of 1 to {MAX_BITS} bits, got {width}")


def _check_stream(stream: Tensor, bits: int, what: str) -> None:
    if stream.dtype != torch.uint8 or stream.ndim != 1 or len(stream) != _bytes(bits):
        raise ArtifactError(
            f"{what}: {_bytes(bits)} bytes expected, found {stream.dtype} {tuple(stream.shape)}; "
            "the file is truncated or belongs to another plan"
        )
    if bits % 8 and int(stream[-1]) >> (bits % 8):
        raise ArtifactError(f"{what}: padding bits are not zero; the file is corrupted")


def pack_layer(codes: Tensor, bits: Tensor, levels: LevelKind) -> PackedLayer:
    """Pack one layer's codes at their own widths.

    Args:
        codes: int8 [O, K], each a legal level of its channel.
        bits: int64 [O], 1 to 8 each.
        levels: ``"uniform"``, or ``"codebook"`` for own values in channels of at most 4 bits.

    Returns:
        The bytes; `unpack_layer` gives codes and bits back exactly.

    Raises:
        ConfigError: Shapes or widths are wrong, or a code is not a legal level of its channel.
    """
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ConfigError(f"codes must be int8 [channels, K], got {codes.dtype} {codes.shape}")
    widths = check_bits(bits, len(codes))
    stream = torch.zeros(_bytes(int(widths.sum()) * codes.shape[1]), dtype=torch.uint8)
    position = 0
    for width in sorted(set(widths.tolist())):
        members = (widths == width).nonzero()[:, 0]
        index = LEVEL_SETS[levels].index(codes.cpu()[members], width, members)
        _write_at(stream, pack_bits(index, width), position)
        position += index.numel() * width
    mixed = bool((widths != widths[0]).any())
    return PackedLayer(
        stream=stream,
        widths=pack_bits(widths - 1, WIDTH_BITS) if mixed else stream[:0].clone(),
        tables=_pack_tables(codes.cpu(), widths, levels),
    )


def unpack_layer(
    packed: PackedLayer,
    shape: tuple[int, int],
    bits: int | Tensor | None = None,
    levels: LevelKind = "uniform",
) -> tuple[Tensor, Tensor]:
    """Invert `pack_layer`.

    Args:
        packed: The bytes.
        shape: (channels O, weights a channel K).
        bits: The width of all channels, or int64 [O]; may be None if ``packed.widths`` tells it.
        levels: What the layer was packed with.

    Returns:
        codes int8 [O, K] and bits int64 [O].

    Raises:
        ArtifactError: The bytes do not fit shape, bits and levels: truncated, too long, padding
            not zero, widths that contradict ``bits``, an index that is no level.
        ConfigError: ``bits`` is None although all channels have one width.
    """
    channels, columns = shape
    widths = _unpack_widths(packed.widths, channels, bits)
    _check_stream(packed.stream, int(widths.sum()) * columns, "codes")
    tables = _unpack_tables(packed.tables, widths, levels)
    codes = torch.empty(shape, dtype=torch.int8)
    position = 0
    for width in sorted(set(widths.tolist())):
        members = (widths == width).nonzero()[:, 0]
        size = len(members) * columns * width
        index = unpack_bits(_read_at(packed.stream, position, size), width, size // width)
        index = index.view(len(members), columns)
        position += size
        codes[members] = LEVEL_SETS[levels].codes(index, width, tables[members])
    return codes, widths


def _write_at(stream: Tensor, octets: Tensor, position: int) -> None:
    """Or ``octets`` into ``stream`` from bit ``position`` on."""
    first, shift = divmod(position, 8)
    room = len(stream) - first
    shifted = octets.to(torch.int16) << shift
    stream[first : first + len(octets)] |= shifted.bitwise_and(255).to(torch.uint8)[:room]
    carry = (shifted >> 8).to(torch.uint8)[: room - 1]
    stream[first + 1 : first + 1 + len(carry)] |= carry


def _read_at(stream: Tensor, position: int, size: int) -> Tensor:
    """Return ``size`` bits of ``stream`` from bit ``position`` on, padded with zeros."""
    first, shift = divmod(position, 8)
    count = _bytes(size)
    octets = stream[first : first + count + 1].to(torch.int16)
    octets = torch.nn.functional.pad(octets, (0, count + 1 - len(octets)))
    joined = ((octets[:-1] >> shift) | (octets[1:] << (8 - shift))).bitwise_and_(255)
    if size % 8:
        joined[-1] &= 2 ** (size % 8) - 1
    return joined.to(torch.uint8)


def _pack_tables(codes: Tensor, widths: Tensor, levels: LevelKind) -> Tensor:
    stored = LEVEL_SETS[levels].stored(widths)
    if not bool(stored.any()):
        return torch.empty(0, dtype=torch.int8)
    tables = codebook_tables(codes, widths)
    return tables[_table_mask(widths, stored, tables.shape[1])]


def _table_mask(widths: Tensor, stored: Tensor, columns: int) -> Tensor:
    """Return which entries [O, columns] of a padded table are stored."""
    sizes = torch.where(stored, 2**widths, 0)
    return torch.arange(columns) < sizes[:, None]


def _unpack_tables(stored: Tensor, widths: Tensor, levels: LevelKind) -> Tensor:
    has_table = LEVEL_SETS[levels].stored(widths)
    fitted = widths[has_table]
    columns = 2 ** int(fitted.max()) if len(fitted) else 0
    expected = int((2**fitted).sum()) if len(fitted) else 0
    if stored.dtype != torch.int8 or stored.shape != (expected,):
        raise ArtifactError(
            f"tables: int8 ({expected},) expected, found {stored.dtype} {tuple(stored.shape)}; "
            "the file is truncated or belongs to another plan"
        )
    tables = torch.zeros(len(widths), columns, dtype=torch.int8)
    if columns:
        mask = _table_mask(widths, has_table, columns)
        tables[mask] = stored
        falling = (tables.to(torch.int16).diff(dim=1) < 0) & mask[:, 1:]
        if bool(falling.any()) or bool((stored == -128).any()):
            raise ArtifactError("tables: values do not ascend; the file is corrupted")
    return tables


def _unpack_widths(stored: Tensor, channels: int, bits: int | Tensor | None) -> Tensor:
    expected = torch.full((channels,), bits) if isinstance(bits, int) else bits
    if expected is not None:
        expected = check_bits(expected, channels)
    if not len(stored):
        if expected is None:
            raise ConfigError("all channels have one width, which the bytes do not tell: pass bits")
        if bool((expected != expected[0]).any()):
            raise ArtifactError("widths: none stored, but the plan's channels differ in width")
        return expected
    widths = unpack_bits(stored, WIDTH_BITS, channels).to(torch.int64) + 1
    if expected is not None and not torch.equal(widths, expected):
        raise ArtifactError("widths: the stored widths are not the plan's; the file is corrupted")
    return widths
