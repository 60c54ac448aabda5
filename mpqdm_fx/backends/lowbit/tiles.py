"""Codes of a block as tiles of bit planes, and back (native/FORMAT.md, "Encodings")."""

import numpy as np
from numpy.typing import NDArray

from mpqdm_fx.backends.lowbit.encodings import BLOCK_ROWS

__all__ = ["TILE_DEPTH", "pack_tiles", "tile_count", "unpack_tiles"]

TILE_DEPTH = 32
_GROUP_DEPTH = 4
_GROUPS = TILE_DEPTH // _GROUP_DEPTH
_VECTOR = BLOCK_ROWS * _GROUP_DEPTH  # bytes of a vector, and codes of a group
_BYTE_BITS = 8
_PLANES = (4, 2, 1)  # bits of the planes, in their order in a tile


def tile_count(depth: int) -> int:
    """Tiles of a block."""
    return -(-depth // TILE_DEPTH)


def pack_tiles(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Pack the codes of blocks.

    Args:
        codes: uint8 [blocks * 8, depth], each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 [blocks, ceil(depth / 32) * 32 * bits]; inputs behind the depth have the code 0.
    """
    rows, depth = codes.shape
    blocks, tiles = rows // BLOCK_ROWS, tile_count(depth)
    padded = np.pad(codes, ((0, 0), (0, tiles * TILE_DEPTH - depth)))
    by_row = padded.reshape(blocks, BLOCK_ROWS, tiles, _GROUPS, _GROUP_DEPTH)
    groups = by_row.transpose(0, 2, 3, 1, 4).reshape(blocks, tiles, _GROUPS, _VECTOR)
    if bits == _BYTE_BITS:
        return groups.reshape(blocks, -1)
    planes, shift = [], 0
    for plane in _planes(bits):
        # Group h of a vector has its lowest bits, group h + plane the next, and so on.
        values = ((groups >> shift) & ((1 << plane) - 1)).reshape(
            blocks, tiles, _GROUPS // plane, plane, _VECTOR
        )
        vectors = values[:, :, 0].copy()
        for position in range(1, _GROUPS // plane):
            vectors |= values[:, :, position] << (plane * position)
        planes.append(vectors)
        shift += plane
    return np.concatenate(planes, axis=2).reshape(blocks, -1)


def unpack_tiles(packed: NDArray[np.uint8], bits: int, depth: int) -> NDArray[np.uint8]:
    """Invert `pack_tiles`.

    Args:
        packed: uint8 [blocks, ceil(depth / 32) * 32 * bits].
        bits: 1 to 8.
        depth: Inputs a row.

    Returns:
        uint8 [blocks * 8, depth].
    """
    blocks, tiles = len(packed), tile_count(depth)
    if bits == _BYTE_BITS:
        groups = packed.reshape(blocks, tiles, _GROUPS, _VECTOR)
    else:
        vectors = packed.reshape(blocks, tiles, bits, _VECTOR)
        groups = np.zeros((blocks, tiles, _GROUPS, _VECTOR), dtype=np.uint8)
        at = shift = 0
        for plane in _planes(bits):
            values = groups.reshape(blocks, tiles, _GROUPS // plane, plane, _VECTOR)
            part = vectors[:, :, at : at + plane]
            for position in range(_GROUPS // plane):
                field = (part >> (plane * position)) & ((1 << plane) - 1)
                values[:, :, position] |= field << shift
            at, shift = at + plane, shift + plane
    by_row = groups.reshape(blocks, tiles, _GROUPS, BLOCK_ROWS, _GROUP_DEPTH)
    rows = by_row.transpose(0, 3, 1, 2, 4).reshape(blocks * BLOCK_ROWS, tiles * TILE_DEPTH)
    return rows[:, :depth]


def _planes(bits: int) -> list[int]:
    return [plane for plane in _PLANES if bits & plane]
