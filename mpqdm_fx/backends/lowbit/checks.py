"""Whether bytes are a weight blob: header, checksum, sections, block table, order of rows."""

import itertools

import numpy as np
from numpy.typing import NDArray

from mpqdm_fx.backends.lowbit.encodings import (
    BLOCK_ROWS,
    KINDS,
    NO_ROW,
    Encoding,
    is_encoding,
    largest_level,
)
from mpqdm_fx.backends.lowbit.layout import (
    ALIGNMENT,
    ENTRY,
    HAS_BIAS,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Header,
    Sections,
    checksum,
    named_offsets,
)
from mpqdm_fx.backends.lowbit.tiles import TILE_DEPTH, tile_count
from mpqdm_fx.errors import ArtifactError

__all__ = ["bad_blob", "checked_entries", "checked_header", "checked_order", "checked_sections"]


def bad_blob(fault: str, detail: str) -> ArtifactError:
    """The error of a blob that cannot be read.

    Args:
        fault: Its name, as the native reader has it: ``"too short"``, ``"bad block"``, ...
        detail: What was found.
    """
    return ArtifactError(f"weight blob: {fault}: {detail}; the file is corrupted, export it again")


def checked_header(octets: NDArray[np.uint8]) -> Header:
    """Read the header and compare the checksum.

    Args:
        octets: The whole blob.

    Returns:
        A header whose sizes fit together.

    Raises:
        ArtifactError: These are not the bytes of a blob of this version.
    """
    if len(octets) < HEADER_BYTES:
        raise bad_blob("too short", f"{len(octets)} bytes, the header alone has {HEADER_BYTES}")
    start = octets[:HEADER_BYTES].tobytes()
    header = Header.unpack(start)
    if header.magic != MAGIC:
        raise bad_blob("not a blob", f"magic {header.magic:#010x}, not {MAGIC:#010x}")
    if (header.version, header.header_bytes) != (VERSION, HEADER_BYTES):
        raise ArtifactError(
            f"weight blob: other version: {header.version} with a header of {header.header_bytes} "
            f"bytes; this package reads version {VERSION}"
        )
    if header.blob_bytes != len(octets):
        fault = "too short" if header.blob_bytes > len(octets) else "too long"
        raise bad_blob(fault, f"{len(octets)} bytes, the header says {header.blob_bytes}")
    _check_sizes(header)
    if header.pack() != start:
        raise bad_blob("bad sizes", "the end of the header is not zero")
    _check_offsets(header)
    if checksum(octets[HEADER_BYTES:]) != header.checksum:
        raise bad_blob("bad checksum", "the bytes behind the header were changed")
    return header


def _check_sizes(header: Header) -> None:
    fault = header.shape.fault()
    if fault is None and header.blob_bytes % ALIGNMENT:
        fault = f"{header.blob_bytes} bytes, no multiple of {ALIGNMENT}"
    if fault is None and header.depth != header.shape.depth:
        fault = f"depth {header.depth}, not {header.shape.depth}"
    if fault is None and header.blocks != -(-header.rows // BLOCK_ROWS):
        fault = f"{header.blocks} blocks for {header.rows} rows"
    if fault is None and header.flags & ~HAS_BIAS:
        fault = f"flags {header.flags:#x}"
    if fault is not None:
        raise bad_blob("bad sizes", fault)


def _check_offsets(header: Header) -> None:
    """The checksum leaves the header out: a changed offset must not lead to other numbers."""
    expected, end = named_offsets(header.rows, bias=bool(header.flags & HAS_BIAS))
    for name, at in expected._asdict().items():
        if (found := getattr(header, name)) != at:
            raise bad_blob("bad offset", f"{name} is {found}, not {at}")
    if end > header.blob_bytes:
        raise bad_blob("bad offset", f"sections end at {end} of {header.blob_bytes} bytes")


def checked_entries(octets: NDArray[np.uint8], header: Header) -> NDArray[np.void]:
    """Read the block table.

    Args:
        octets: The whole blob.
        header: Of the blob, checked.

    Returns:
        Entries [blocks] of encodings that there are.

    Raises:
        ArtifactError: An entry says what no block has.
    """
    size = header.blocks * ENTRY.itemsize
    entries = octets[header.block_at : header.block_at + size].view(ENTRY)
    for index, entry in enumerate(entries):
        kind, bits = int(entry["kind"]), int(entry["bits"])
        if not is_encoding(kind, bits) or entry["zero"]:
            raise bad_blob("bad block", f"block {index} has the kind {kind} of {bits} bits")
        encoding = Encoding(KINDS[kind], bits)
        if (encoding.kind == "table") != bool(entry["tables_at"]):
            found = "a table" if entry["tables_at"] else "no table"
            raise bad_blob("bad block", f"block {index} of kind {encoding.kind} has {found}")
        expected = largest_level(encoding)
        if expected is not None and entry["largest"] != expected:
            found = f"largest {entry['largest']}, not {expected}"
            raise bad_blob("bad block", f"block {index}: {found}")
    return entries


def checked_sections(header: Header, entries: NDArray[np.void]) -> Sections:
    """Check that tables and codes are aligned, inside the blob and apart, and count all bytes.

    Args:
        header: Of the blob, checked.
        entries: Of the block table, checked.

    Returns:
        Bytes by section.

    Raises:
        ArtifactError: Names the section that is not.
    """
    spans = [
        ("header", 0, HEADER_BYTES),
        ("order", header.order_at, 4 * BLOCK_ROWS * header.blocks),
        ("blocks", header.block_at, ENTRY.itemsize * header.blocks),
        ("scale", header.scale_at, 4 * header.rows),
        *([("bias", header.bias_at, 4 * header.rows)] if header.bias_at else []),
    ]
    tile_depth = tile_count(header.depth) * TILE_DEPTH
    for entry in entries:
        if entry["tables_at"]:
            at = ALIGNMENT * int(entry["tables_at"])
            spans.append(("tables", at, BLOCK_ROWS << int(entry["bits"])))
        spans.append(("codes", int(entry["codes_at"]), tile_depth * int(entry["bits"])))
    _check_apart(spans, header)
    sizes = dict.fromkeys(Sections._fields, 0)
    for name, _, size in spans:
        sizes[name] += size
    return Sections(**{**sizes, "padding": header.blob_bytes - sum(sizes.values())})


def _check_apart(spans: list[tuple[str, int, int]], header: Header) -> None:
    for name, at, _ in spans:
        if at % ALIGNMENT:
            raise bad_blob("bad offset", f"{name} at {at}, no multiple of {ALIGNMENT}")
    ordered = [*sorted(spans, key=lambda span: span[1]), ("the end", header.blob_bytes, 0)]
    for (name, at, size), (other, start, _) in itertools.pairwise(ordered):
        if at + size > start:
            raise bad_blob("bad offset", f"{name} at {at}, {size} bytes, runs into {other}")


def checked_order(octets: NDArray[np.uint8], header: Header) -> NDArray[np.int64]:
    """Read the output channels of the rows.

    Args:
        octets: The whole blob.
        header: Of the blob, checked with its sections.

    Returns:
        int64 [rows], a permutation; fill is left out.

    Raises:
        ArtifactError: The order is no permutation, or its fill is not at its end.
    """
    size = 4 * BLOCK_ROWS * header.blocks
    order = octets[header.order_at : header.order_at + size].view("<u4").astype(np.int64)
    rows, fill = order[: header.rows], order[header.rows :]
    if not np.array_equal(np.sort(rows), np.arange(header.rows)) or (fill != NO_ROW).any():
        raise bad_blob("bad order", f"not a permutation of {header.rows} rows with its fill behind")
    return rows
