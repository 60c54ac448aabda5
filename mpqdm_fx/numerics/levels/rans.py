"""An entropy coder in whole numbers: the same bytes on every machine.

Asymmetric numeral systems in their range form (Duda 2013). A state x of 32 bits holds what is
coded. To decode a code is to look up the low 12 bits of x in the table of the code's class, which
has `frequency` slots from `start` on for it, and to go on with

    x <- frequency * (x >> 12) + (x & 4095) - start,

taking 16 bits of the stream below the others where x falls under 2^16. The encoder runs backwards.
Several states take turns (code i has state i mod lanes), so that a processor computes them at once.

A class has no slots for codes that are too large for it: the number ESCAPE stands in their places,
and their bytes follow all other codes, in a class of 256 equally frequent numbers.

This is the reference, and what runs without the library `mpqdm_kernels`: some million codes a
second.
"""

import json
import struct
from collections.abc import Iterator
from functools import cache
from importlib import resources

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError

__all__ = [
    "CLASSES",
    "ESCAPE",
    "ESCAPED_BITS",
    "TOP",
    "TOTAL",
    "class_frequencies",
    "decode_run",
    "encode_run",
    "lanes_of",
]

CLASSES = 40
"""Deviations, from a sixteenth of a step up, three an octave."""

TOP = 127
"""Largest code."""

ESCAPE = -TOP - 1
"""What stands for a code that its class has no slots for."""

ESCAPED_BITS = 8

_SLOT_BITS = 12

TOTAL = 2**_SLOT_BITS
"""Slots of a class."""

_RAW = CLASSES  # the class of bytes behind the codes
_LEAST = 2**16  # of a state
_MOST_LANES, _LANE_CODES = 32, 8192
_CHUNK = 1 << 16


def lanes_of(count: int) -> int:
    """States that so many codes take turns with: a power of two up to 32.

    A state takes 4 bytes, of which its codes get one or two.
    """
    lanes = 1
    while lanes < _MOST_LANES and 2 * lanes * _LANE_CODES <= count:
        lanes *= 2
    return lanes


@cache
def class_frequencies() -> Tensor:
    """Slots of every number in every class, int64 [CLASSES, 256]; number k is at k - ESCAPE."""
    text = resources.files(__package__).joinpath("entropy_tables.json").read_text("utf-8")
    table = torch.zeros(CLASSES, 256, dtype=torch.int64)
    for row, kept in zip(table, json.loads(text), strict=True):
        half = torch.tensor(kept)
        middle, largest = -ESCAPE, len(kept) - 1
        row[middle : middle + largest + 1] = half
        row[middle - largest : middle] = half[1:].flip(0)
        row[0] = TOTAL - row.sum()
    return table


@cache
def _slots() -> tuple[list[int], list[int], list[int]]:
    """Frequencies and starts by class and number, and the decoder's table by class and slot.

    An entry of the table is number + 256 * (frequency + TOTAL * place in the number's slots).
    """
    frequencies = torch.cat([class_frequencies(), torch.full((1, 256), TOTAL // 256)])
    starts = frequencies.cumsum(1) - frequencies
    numbers = torch.arange(256).expand(CLASSES + 1, -1)
    each = frequencies.flatten()
    place = torch.arange((CLASSES + 1) * TOTAL) % TOTAL
    place -= starts.flatten().repeat_interleave(each)
    entries = numbers.flatten().repeat_interleave(each) + 256 * (
        each.repeat_interleave(each) + TOTAL * place
    )
    return each.tolist(), starts.flatten().tolist(), entries.tolist()


def encode_run(codes: Tensor, classes: Tensor) -> Tensor:
    """Code numbers of known classes.

    Args:
        codes: int8 [n], -127..127.
        classes: uint8 [n], below CLASSES.

    Returns:
        Bytes, uint8: the states, 4 bytes each, then the words of 2 bytes; little endian.
    """
    at = classes.long() * 256 + codes.long() - ESCAPE
    kept = class_frequencies().flatten()[at] > 0
    lanes = lanes_of(len(codes))
    states, words = [_LEAST] * lanes, list[int]()
    raw = codes[~kept].long() - ESCAPE + 256 * _RAW
    # what is decoded last is encoded first
    _push(raw, states, words)
    _push(torch.where(kept, at, classes.long() * 256), states, words)
    octets = struct.pack(f"<{lanes}I{len(words)}H", *states, *reversed(words))
    return torch.frombuffer(bytearray(octets), dtype=torch.uint8)


def _push(places: Tensor, states: list[int], words: list[int]) -> None:
    """Encode numbers, which are told by their places in the tables, from the last to the first."""
    frequencies, starts, _ = _slots()
    lane = len(places) % len(states)
    for part in reversed(torch.split(places, _CHUNK)):
        for place in reversed(part.tolist()):
            lane = (lane or len(states)) - 1
            frequency, x = frequencies[place], states[lane]
            if x >> 20 >= frequency:
                words.append(x & 0xFFFF)
                x >>= 16
            states[lane] = (x // frequency << _SLOT_BITS) + x % frequency + starts[place]


def decode_run(stream: Tensor, classes: Tensor) -> Tensor:
    """Inverse of `encode_run`.

    Args:
        stream: uint8, all of the bytes.
        classes: uint8 [n], below CLASSES.

    Returns:
        int8 [n].

    Raises:
        ArtifactError: The bytes are not those of so many codes of these classes.
    """
    lanes = lanes_of(len(classes))
    if len(stream) % 2 or len(stream) < 4 * lanes:
        raise ArtifactError("codes: the words of an entropy-coded layer are cut; corrupted")
    octets = _bytes(stream)
    states = list(struct.unpack_from(f"<{lanes}I", octets))
    words = struct.iter_unpack("<H", octets[4 * lanes :])
    try:
        codes = _pop(_bytes(classes), states, words)
        escaped = codes == ESCAPE
        raw = _pop(bytes([_RAW]) * int(escaped.sum()), states, words)
    except StopIteration:
        raise ArtifactError("codes: an entropy-coded layer ends too early; corrupted") from None
    if next(words, None) is not None or states != [_LEAST] * lanes:
        raise ArtifactError("codes: an entropy-coded layer does not end where it is to; corrupted")
    if bool((raw == ESCAPE).any()):
        raise ArtifactError("codes: an entropy-coded layer has the code -128; corrupted")
    codes[escaped] = raw
    return codes


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().numpy().tobytes())


def _pop(classes: bytes, states: list[int], words: Iterator[tuple[int]]) -> Tensor:
    """Decode numbers, int8; StopIteration where the words run out."""
    entries = _slots()[2]
    numbers = bytearray(len(classes))
    lanes = len(states)
    lane = 0
    for i, place in enumerate(classes):
        x = states[lane]
        entry = entries[(place << _SLOT_BITS) + (x & (TOTAL - 1))]
        numbers[i] = entry & 255
        x = (entry >> 8 & (TOTAL - 1)) * (x >> _SLOT_BITS) + (entry >> 8 + _SLOT_BITS)
        if x < _LEAST:
            x = x << 16 | next(words)[0]
        states[lane] = x
        lane = lane + 1 & lanes - 1
    octets = torch.frombuffer(numbers, dtype=torch.uint8) if numbers else torch.empty(0)
    return (octets.to(torch.int16) + ESCAPE).to(torch.int8)
