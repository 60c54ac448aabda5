"""Entropy-coded weights behind a program, in place of those inside (native/FORMAT.md).

The kernels read rows of whole bits in place, the fewest that hold a row's codes; the entropy coder
of stored weights takes less. So a program is kept and sent with its layers' codes coded behind it,
and `kernel_library.place_codes` puts them back when it is expanded.
"""

import struct
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpqdm_fx.backends.kernel_library import CODED_END
from mpqdm_fx.backends.lowbit.checks import checked_entries, checked_header, checked_sections
from mpqdm_fx.backends.lowbit.layout import HEADER_BYTES, MAGIC, Header
from mpqdm_fx.backends.lowbit.tiles import TILE_DEPTH, tile_count, unpack_tiles
from mpqdm_fx.errors import ArtifactError
from mpqdm_fx.io.fast_coder import installed_coder
from mpqdm_fx.numerics.levels.entropy_code import encode

__all__ = ["take_codes"]

_ALIGNMENT = 16  # of a program's tensors
_BYTE_BITS = 8
_LAYER = struct.Struct("<QQ")
_FOOTER = struct.Struct("<QQIHHI4s")
_VERSION = 1


def take_codes(program: NDArray[np.uint8]) -> bytes:
    """Code the weights of own kernels; where that is shorter they become zeros in the program.

    Args:
        program: uint8 [n], all bytes of a program, which are changed.

    Returns:
        What follows the program; empty where no layer's codes get shorter, and the program is then
        as it was.
    """
    streams, layers = [], []
    for at, header in _blobs(program):
        blob = program[at : at + header.blob_bytes]
        stream = _taken(blob, header)
        if stream is not None:
            streams.append(stream)
            layers.append(_LAYER.pack(at, len(stream)))
    if not layers:
        return b""
    footer = _FOOTER.pack(len(program), len(layers), 0, _FOOTER.size, _VERSION, 0, CODED_END)
    return b"".join((*streams, *layers, footer))


def _blobs(program: NDArray[np.uint8]) -> Iterator[tuple[int, Header]]:
    """Where weight blobs begin, and their headers."""
    whole = len(program) // _ALIGNMENT * _ALIGNMENT
    words = program[:whole].view("<u4")[:: _ALIGNMENT // 4]
    for index in np.flatnonzero(words == MAGIC):
        at = _ALIGNMENT * int(index)
        if len(program) - at < HEADER_BYTES:
            return
        size = Header.unpack(program[at : at + HEADER_BYTES].tobytes()).blob_bytes
        try:
            header = checked_header(program[at : at + size])
            checked_sections(header, checked_entries(program[at : at + size], header))
        except ArtifactError:
            continue  # other bytes that begin alike
        yield at, header


def _taken(blob: NDArray[np.uint8], header: Header) -> bytes | None:
    """The codes of a blob, which become zeros there; None where they are not shorter."""
    places = header.kernel**2
    spans, rows = [], []
    for entry in checked_entries(blob, header):
        at, bits = int(entry["codes_at"]), int(entry["bits"])
        span = slice(at, at + tile_count(header.depth) * TILE_DEPTH * bits)
        codes = unpack_tiles(blob[span][None], bits, header.depth)
        middle = 0 if bits == _BYTE_BITS else 1 << (bits - 1)
        spans.append(span)
        rows.append((codes - np.uint8(middle)).view(np.int8))
    numbers = torch.from_numpy(np.concatenate(rows))
    if bool((numbers == torch.iinfo(torch.int8).min).any()):
        return None  # which the coder has no number for
    stream = encode(_by_channel(numbers, header.channels), places, installed_coder()).numpy()
    if len(stream) >= sum(span.stop - span.start for span in spans):
        return None
    for span in spans:
        blob[span] = 0
    return bytes(stream.tobytes())


def _by_channel(numbers: Tensor, channels: int) -> Tensor:
    """[rows, place, channel] as [rows, channel, place]."""
    by_place = numbers.view(len(numbers), -1, channels)
    return by_place.transpose(1, 2).reshape(len(numbers), -1).contiguous()
