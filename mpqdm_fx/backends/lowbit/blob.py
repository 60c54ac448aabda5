"""Weights of one layer as one tensor of bytes, read in place by the kernels (native/FORMAT.md).

Each row has the narrowest encoding that holds its codes. Nothing but the int8 codes decides it.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.backends.lowbit.checks import (
    bad_blob,
    checked_entries,
    checked_header,
    checked_order,
    checked_sections,
)
from mpqdm_fx.backends.lowbit.encodings import (
    BLOCK_ROWS,
    KINDS,
    NO_ROW,
    Blocks,
    Encoding,
    code_tables,
    form_blocks,
    largest_level,
    level_tables,
    values_present,
)
from mpqdm_fx.backends.lowbit.layout import (
    ALIGNMENT,
    ENTRY,
    HAS_BIAS,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Header,
    Layout,
    Sections,
    WeightShape,
    checksum,
    lay_out,
)
from mpqdm_fx.backends.lowbit.tiles import TILE_DEPTH, pack_tiles, tile_count, unpack_tiles
from mpqdm_fx.errors import ConfigError

__all__ = ["BlobContent", "Encoding", "Sections", "blob_bytes", "pack_blob", "unpack_blob"]

_Octet = TypeVar("_Octet", np.int8, np.uint8)
_CHUNK_CODES = 1 << 19  # codes packed together, so that temporaries stay in the cache


@dataclass(frozen=True, eq=False)
class BlobContent:
    """What a blob holds.

    Attributes:
        codes: int8 [rows, depth], depth in the order (kernel row, kernel column, input channel).
        scale: float32 [rows].
        bias: float32 [rows], or None.
        kernel: Height and width of the kernel, 1 or 3.
        channels: Input channels, ``depth / kernel^2``.
        blocks: The encoding of each block of 8 rows.
        sections: Bytes by section; together the bytes of the blob.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    kernel: int
    channels: int
    blocks: tuple[Encoding, ...]
    sections: Sections


def pack_blob(codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Write the weights of one layer as a blob.

    Args:
        codes: int8 [rows, depth], or [rows, channels, height, width] with a kernel of 1x1 or 3x3.
            Channels are a multiple of 4.
        scale: float32 [rows], positive.
        bias: float32 [rows], or None.

    Returns:
        uint8 [bytes]; `unpack_blob` gives codes, scale and bias back exactly.

    Raises:
        ConfigError: A dtype or a shape is wrong, or a number is not finite or a scale not positive.
        LoweringError: The kernels have no such layer.
    """
    shape, rows = _rows(codes)
    _check_numbers("scale", scale, shape.rows)
    if not bool((scale > 0).all()):
        raise ConfigError("scale: every row's scale must be positive")
    if bias is not None:
        _check_numbers("bias", bias, shape.rows)
    present = values_present(rows)
    blocks = form_blocks(present)
    layout = lay_out(blocks, shape.depth, bias=bias is not None)
    octets = np.zeros(layout.blob_bytes, dtype=np.uint8)
    order = blocks.order.copy()
    order[shape.rows :] = NO_ROW
    _write(octets, layout.named.order_at, order.astype("<u4"))
    _write(octets, layout.named.scale_at, _numbers(scale))
    if bias is not None:
        _write(octets, layout.named.bias_at, _numbers(bias))
    largest = _write_codes(octets, layout, blocks, present, rows)
    _write(octets, layout.named.block_at, _entries(layout, blocks, largest))
    _write(octets, 0, np.frombuffer(_header(octets, layout, shape).pack(), dtype=np.uint8))
    return torch.from_numpy(octets)


def blob_bytes(codes: Tensor, *, bias: bool) -> int:
    """Bytes of the blob of a layer, without packing it.

    Args:
        codes: As `pack_blob` takes them.
        bias: Whether the layer has a bias.

    Raises:
        ConfigError: The dtype or the shape is wrong.
        LoweringError: The kernels have no such layer.
    """
    shape, rows = _rows(codes)
    return lay_out(form_blocks(values_present(rows)), shape.depth, bias=bias).blob_bytes


def unpack_blob(blob: Tensor) -> BlobContent:
    """Read a blob; everything in it is checked.

    Args:
        blob: uint8 [bytes].

    Returns:
        The weights and what takes how many bytes.

    Raises:
        ArtifactError: This is no blob, or it was changed or cut. Says which part is wrong.
    """
    if blob.dtype != torch.uint8 or blob.ndim != 1:
        raise bad_blob("not a blob", f"uint8 [bytes] expected, found {blob.dtype} {blob.ndim}-D")
    octets = blob.detach().cpu().contiguous().numpy()
    header = checked_header(octets)
    entries = checked_entries(octets, header)
    sections = checked_sections(header, entries)
    order = checked_order(octets, header)
    blocks = tuple(Encoding(KINDS[entry["kind"]], int(entry["bits"])) for entry in entries)
    scale = _read_numbers(octets, header.scale_at, header.rows)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise bad_blob("bad scale", "a scale is not positive and finite")
    return BlobContent(
        codes=_read_codes(octets, header, entries, blocks, order),
        scale=scale,
        bias=_read_numbers(octets, header.bias_at, header.rows) if header.bias_at else None,
        kernel=header.kernel,
        channels=header.channels,
        blocks=blocks,
        sections=sections,
    )


def _rows(codes: Tensor) -> tuple[WeightShape, NDArray[np.int8]]:
    """Shape and codes [rows, depth] in the order of the kernels."""
    if codes.dtype != torch.int8:
        raise ConfigError(f"a weight blob takes int8 codes, got {codes.dtype}")
    shape = WeightShape.of(tuple(codes.shape))
    plain = codes.detach().cpu()
    ordered = plain.permute(0, 2, 3, 1) if plain.ndim == 4 else plain
    rows: NDArray[np.int8] = ordered.reshape(shape.rows, shape.depth).contiguous().numpy()
    return shape, rows


def _check_numbers(name: str, values: Tensor, rows: int) -> None:
    if values.dtype != torch.float32 or values.shape != (rows,):
        raise ConfigError(
            f"{name}: float32 [{rows}] expected, got {values.dtype} {list(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        raise ConfigError(f"{name}: a number is NaN or infinite; look at the layer's weights")


def _numbers(values: Tensor) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = values.detach().cpu().contiguous().numpy().astype("<f4")
    return numbers


def _write(octets: NDArray[np.uint8], at: int, values: NDArray[np.generic]) -> None:
    data = values.view(np.uint8)
    octets[at : at + len(data)] = data


def _write_codes(
    octets: NDArray[np.uint8],
    layout: Layout,
    blocks: Blocks,
    present: NDArray[np.bool_],
    rows: NDArray[np.int8],
) -> NDArray[np.uint8]:
    """Write codes and tables; return the greatest absolute level [blocks]."""
    largest = np.zeros(len(blocks.bits), dtype=np.uint8)
    step = max(1, _CHUNK_CODES // (BLOCK_ROWS * rows.shape[1]))
    for first, last, encoding in blocks.runs():
        for start in range(first, last, step):
            part = slice(start, min(start + step, last))
            members = blocks.order[BLOCK_ROWS * part.start : BLOCK_ROWS * part.stop]
            values = present[members]
            codes = _looked_up(code_tables(values, encoding), rows[members], 128)
            packed = pack_tiles(codes, encoding.bits)
            for at, data in zip(layout.codes_at[part], packed, strict=True):
                octets[at : at + len(data)] = data
            if encoding.kind == "table":
                tables = level_tables(values, encoding.bits).reshape(len(packed), -1)
                for at, table in zip(layout.tables_at[part], tables, strict=True):
                    _write(octets, at, table)
            largest[part] = _largest(values, encoding)
    return largest


def _largest(present: NDArray[np.bool_], encoding: Encoding) -> NDArray[np.int64] | int:
    """Greatest absolute level of blocks: of the encoding, or of the values there are."""
    known = largest_level(encoding)
    if known is not None:
        return known
    absolute = np.abs(np.arange(-128, 128))
    greatest: NDArray[np.int64] = (present * absolute).max(1).reshape(-1, BLOCK_ROWS).max(1)
    return greatest


def _looked_up(
    tables: NDArray[_Octet], index: NDArray[np.int8] | NDArray[np.uint8], origin: int
) -> NDArray[_Octet]:
    """``tables[row, index[row, column] + origin]``."""
    offsets = tables.shape[1] * np.arange(len(tables), dtype=np.intp)[:, None] + origin
    values: NDArray[_Octet] = np.ascontiguousarray(tables).reshape(-1).take(index + offsets)
    return values


def _entries(layout: Layout, blocks: Blocks, largest: NDArray[np.uint8]) -> NDArray[np.void]:
    entries = np.zeros(len(blocks.bits), dtype=ENTRY)
    entries["codes_at"] = layout.codes_at
    entries["tables_at"] = layout.tables_at // ALIGNMENT
    entries["kind"], entries["bits"], entries["largest"] = blocks.kinds, blocks.bits, largest
    return entries


def _header(octets: NDArray[np.uint8], layout: Layout, shape: WeightShape) -> Header:
    return Header(
        magic=MAGIC,
        version=VERSION,
        header_bytes=HEADER_BYTES,
        blob_bytes=layout.blob_bytes,
        checksum=checksum(octets[HEADER_BYTES:]),
        rows=shape.rows,
        depth=shape.depth,
        channels=shape.channels,
        kernel=shape.kernel,
        blocks=-(-shape.rows // BLOCK_ROWS),
        flags=HAS_BIAS if layout.named.bias_at else 0,
        **layout.named._asdict(),
    )


def _read_numbers(octets: NDArray[np.uint8], at: int, count: int) -> Tensor:
    return torch.from_numpy(octets[at : at + 4 * count].view("<f4").astype(np.float32))


def _read_codes(
    octets: NDArray[np.uint8],
    header: Header,
    entries: NDArray[np.void],
    blocks: tuple[Encoding, ...],
    order: NDArray[np.int64],
) -> Tensor:
    rows = np.empty((header.rows, header.depth), dtype=np.int8)
    tile_depth = tile_count(header.depth) * TILE_DEPTH
    for index, (entry, encoding) in enumerate(zip(entries, blocks, strict=True)):
        at = int(entry["codes_at"])
        packed = octets[at : at + tile_depth * encoding.bits]
        codes = unpack_tiles(packed[None], encoding.bits, header.depth)
        levels = _levels(octets, ALIGNMENT * int(entry["tables_at"]), encoding)
        if encoding.kind == "table" and np.abs(levels.astype(int)).max() != entry["largest"]:
            raise bad_blob("bad block", f"block {index}: largest is not that of its tables")
        members = order[BLOCK_ROWS * index : BLOCK_ROWS * (index + 1)]
        values = _looked_up(levels, codes, 0)[: len(members)]
        if np.abs(values.astype(np.int16)).max() > entry["largest"]:
            raise bad_blob("bad block", f"block {index}: a code exceeds its largest")
        rows[members] = values
    return torch.from_numpy(rows)


def _levels(octets: NDArray[np.uint8], tables_at: int, encoding: Encoding) -> NDArray[np.int8]:
    """What the codes of a block stand for, int8 [8, 2^bits]."""
    kind, size = encoding.kind, 1 << encoding.bits
    if kind == "table":
        tables = octets[tables_at : tables_at + BLOCK_ROWS * size].view(np.int8)
        return tables.reshape(BLOCK_ROWS, size)
    codes = np.arange(size)
    if kind == "odd":
        levels = 2 * codes - (size - 1)
    else:
        levels = codes - size // 2 if kind == "integer" else codes
    return np.broadcast_to(levels.astype(np.uint8).view(np.int8), (BLOCK_ROWS, size))
