"""How rows of int8 codes are encoded in a weight blob, and which rows share a block.

The encodings are those of native/FORMAT.md. All of them follow from which int8 values a row holds,
so the codes are read once, into a table of values present.
"""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BLOCK_ROWS",
    "KINDS",
    "NO_ROW",
    "Blocks",
    "Encoding",
    "code_tables",
    "form_blocks",
    "is_encoding",
    "largest_level",
    "level_tables",
    "values_present",
]

BLOCK_ROWS = 8
NO_ROW = 0xFFFFFFFF  # order of a block's row that stands for no channel
KINDS = ("odd", "integer", "table", "byte")  # by number in the blob; of equal widths the first wins
_ODD, _INTEGER, _TABLE, _BYTE = range(4)
_WIDEST = (7, 7, 4, 8)
_NONE = 99  # width of an encoding that cannot hold a row
_CHUNK_CODES = 1 << 19  # codes looked at together, so that temporaries stay in the cache
_LEVELS = np.arange(-128, 128)
_BIT_LENGTH = np.array([value.bit_length() for value in range(256)])


class Encoding(NamedTuple):
    """What the codes of a block stand for.

    Attributes:
        kind: ``"odd"``, ``"integer"``, ``"table"`` or ``"byte"``.
        bits: Bits a code: 1 to 7, for a table 1 to 4, for a byte 8.
    """

    kind: str
    bits: int


class Blocks(NamedTuple):
    """Rows sorted into blocks of 8.

    Attributes:
        order: int64 [blocks * 8], the output channel of each row of each block; the fill of the
            last block repeats the last channel.
        rows: How many of `order` stand for channels; fill is behind them.
        kinds: int64 [blocks], indices of `KINDS`.
        bits: int64 [blocks].
    """

    order: NDArray[np.int64]
    rows: int
    kinds: NDArray[np.int64]
    bits: NDArray[np.int64]

    def runs(self) -> list[tuple[int, int, Encoding]]:
        """Neighbouring blocks of one encoding: first block, block behind the last, encoding."""
        keys = self.bits * len(KINDS) + self.kinds
        edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)]
        return [
            (start, stop, Encoding(KINDS[int(self.kinds[start])], int(self.bits[start])))
            for start, stop in itertools.pairwise(edges)
        ]


def is_encoding(kind: int, bits: int) -> bool:
    """Whether a number of `KINDS` and a width are an encoding."""
    if kind == _BYTE:
        return bits == _WIDEST[kind]
    return 0 <= kind < _BYTE and 1 <= bits <= _WIDEST[kind]


def largest_level(encoding: Encoding) -> int | None:
    """Greatest absolute value of an encoding; None where tables or bytes say it."""
    if encoding.kind == "odd":
        return (1 << encoding.bits) - 1
    return 1 << (encoding.bits - 1) if encoding.kind == "integer" else None


def values_present(codes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Which values each row holds.

    Args:
        codes: int8 [rows, depth].

    Returns:
        bool [rows, 256]; entry ``v + 128`` of a row tells whether the row holds v.
    """
    rows, depth = codes.shape
    present = np.zeros((rows, 256), dtype=np.bool_)
    step = max(1, _CHUNK_CODES // depth)
    for start in range(0, rows, step):
        part = present[start : start + step]
        offsets = 256 * np.arange(len(part), dtype=np.intp)[:, None] + 128
        part.reshape(-1)[codes[start : start + step] + offsets] = True
    return present


def _extremes(present: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Smallest and largest value of each row."""
    return _LEVELS[present.argmax(1)], _LEVELS[255 - present[:, ::-1].argmax(1)]


def _widths(present: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Narrowest width [rows, kinds] of each kind of encoding that holds a row."""
    low, high = _extremes(present)
    odd = _BIT_LENGTH[np.maximum(-low, high)]
    # Of b bits, one is the sign: -2^(b-1) and 2^(b-1) - 1 are the ends.
    integer = 1 + _BIT_LENGTH[np.maximum(np.maximum(-low - 1, high), 0)]
    table = np.maximum(_BIT_LENGTH[present.sum(1) - 1], 1)
    widths = np.stack([odd, integer, table, np.full_like(odd, _WIDEST[_BYTE])], axis=1)
    widths[widths > _WIDEST] = _NONE
    widths[present[:, _LEVELS % 2 == 0].any(1), _ODD] = _NONE
    return widths


def form_blocks(present: NDArray[np.bool_]) -> Blocks:
    """Sort rows into blocks that share an encoding.

    Each row has the encoding of fewest bits that holds it. Eight rows of one encoding make a block.
    What is left over of all encodings is sorted by width and cut into blocks too; each takes the
    encoding of fewest bits that holds its rows. The widest come first, so that the rows missing
    from the last block are missing from the narrowest.

    Args:
        present: bool [rows, 256] of `values_present`.

    Returns:
        The blocks, whole ones of one encoding first, by width.
    """
    widths, rows = _widths(present), len(present)
    keys = widths.min(1) * len(KINDS) + widths.argmin(1)
    ordered = np.argsort(keys, kind="stable")
    _, first, sizes = np.unique(keys[ordered], return_index=True, return_counts=True)
    rank = np.arange(rows) - np.repeat(first, sizes)
    whole = rank < np.repeat(sizes - sizes % BLOCK_ROWS, sizes)
    left_over = ordered[~whole]
    left_over = left_over[np.argsort(-keys[left_over], kind="stable")]
    order = np.concatenate([ordered[whole], left_over])
    order = np.concatenate([order, np.repeat(order[-1:], -rows % BLOCK_ROWS)])
    shared = widths[order].reshape(-1, BLOCK_ROWS, len(KINDS)).max(1)
    return Blocks(order, rows, shared.argmin(1), shared.min(1))


def code_tables(present: NDArray[np.bool_], encoding: Encoding) -> NDArray[np.uint8]:
    """The code of each value that a row holds.

    Args:
        present: bool [rows, 256] of `values_present`; the encoding holds all of these values.
        encoding: Of all rows.

    Returns:
        uint8 [rows, 256]; entry ``v + 128`` is the code of v, and of no meaning where the row does
        not hold v.
    """
    if encoding.kind == "table":
        return (np.cumsum(present, axis=1) - 1).astype(np.uint8)
    if encoding.kind == "odd":
        codes = (_LEVELS + (1 << encoding.bits) - 1) >> 1
    elif encoding.kind == "integer":
        codes = _LEVELS + (1 << (encoding.bits - 1))
    else:
        codes = _LEVELS
    return np.broadcast_to((codes & 255).astype(np.uint8), present.shape)


def level_tables(present: NDArray[np.bool_], bits: int) -> NDArray[np.int8]:
    """Tables of rows of the encoding ``table``.

    Args:
        present: bool [rows, 256] of `values_present`, at most 2^bits values a row.
        bits: 1 to 4.

    Returns:
        int8 [rows, 2^bits]: a row's values ascending, the largest repeated.
    """
    _, high = _extremes(present)
    tables = np.repeat(high[:, None], 1 << bits, axis=1).astype(np.int8)
    row, value = np.nonzero(present)
    tables[row, (np.cumsum(present, axis=1) - 1)[row, value]] = _LEVELS[value]
    return tables
