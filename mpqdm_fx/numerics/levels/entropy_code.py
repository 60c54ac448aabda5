"""Codes without a fixed width: whole numbers -127..127, stored by what they tell.

Small numbers are frequent and take few bits. Each weight has one of 40 classes, a rounded Gaussian
of some deviation, and the entropy coder (`rans`) spends -log2 of its frequency there. A weight's
class is that of its row, shifted by its input channel and by its place in the kernel: six bits a
row, four a channel, four a place, and no table in the file.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Protocol, Self

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels.packing import pack_bits, unpack_bits
from mpqdm_fx.numerics.levels.rans import (
    CLASSES,
    ESCAPED_BITS,
    TOP,
    TOTAL,
    class_frequencies,
    decode_run,
    encode_run,
)

__all__ = ["CodeClasses", "Coder", "code_lengths", "decode", "encode"]

_ROW_BITS, _SHIFT_BITS = 6, 4
_SHIFTS = 2**_SHIFT_BITS  # -8..7
_FEW_ROWS = 4  # rows below which a shift of a channel costs more than it brings
_MOST_CODES = 2**15  # that a byte can tell
_NEAR = 6  # classes on both sides that a row is moved by at most, once it has one
_COUNTS = 1 << 22  # of codes by class and size, held at once
_LOOKED_UP = 8  # cells of counts that are filled in the time that looks one code up
_EXACT = 2**20  # parts of a bit: float64 sums of them are the same in any order


class Coder(Protocol):
    """What does the work of `rans` and `decode`, with the same bytes, but fast."""

    def encode(self, codes: Tensor, classes: Tensor) -> Tensor:
        """As `rans.encode_run`."""

    def decode(self, stream: Tensor, shape: tuple[int, int], places: int) -> Tensor:
        """As `decode`."""


@cache
def code_lengths() -> Tensor:
    """Bits of every code in every class, float32 [CLASSES, 2 TOP + 1]; code k is at k + TOP.

    In whole parts of 2^-20, which float64 adds up exactly: classes are the same on every machine.
    """
    bits = -(class_frequencies().double() / TOTAL).log2()
    kept, escaped = bits[:, 1:], bits[:, :1] + ESCAPED_BITS
    return ((torch.where(kept.isinf(), escaped, kept) * _EXACT).round() / _EXACT).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class CodeClasses:
    """The class of every weight of a layer.

    Attributes:
        rows: Class of each row, int64 [O].
        channels: Shift of each input channel, -8..7, int64 [I].
        places: Shift of each place of the kernel, -8..7, int64 [T]; T is 1 for linear layers.
    """

    rows: Tensor
    channels: Tensor
    places: Tensor

    @classmethod
    def of(cls, codes: Tensor, places: int) -> Self:
        """Classes that fit the codes of a layer.

        Args:
            codes: Whole numbers [O, I * T], places of a channel one after the other.
            places: T.
        """
        size = (codes.double().square().mean(dim=1) + 1e-3).sqrt().log2()
        rows = ((size + 4) * 3).round().clamp(0, CLASSES - 1).long()
        zeros = codes.new_zeros(codes.shape[1] // places, dtype=torch.int64)
        start = cls(rows=rows, channels=zeros, places=zeros.new_zeros(places))
        return start.fitted(codes).fitted(codes)

    def of_weights(self) -> Tensor:
        """Class of every weight, int64 [O, I * T]."""
        return (self.rows[:, None] + self._columns()).clamp_(0, CLASSES - 1)

    def _columns(self) -> Tensor:
        return (self.channels[:, None] + self.places).flatten()

    def bits(self, codes: Tensor) -> Tensor:
        """Bits of the codes of each row, float64 [O]; what tells the classes is not in it."""
        return _lengths(self.of_weights(), codes).sum(dim=1, dtype=torch.float64)

    @property
    def header_bits(self) -> int:
        """Bits of what tells the classes."""
        shifts = len(self.channels) if _shifts_channels(len(self.rows)) else 0
        shifts += len(self.places) if len(self.places) > 1 else 0
        return _ROW_BITS * len(self.rows) + _SHIFT_BITS * shifts

    def fitted(self, codes: Tensor) -> Self:
        """Each row, channel and place at its best class, the others kept; never more bits."""
        fitted = replace(self, rows=self._best_rows(codes))
        if _shifts_channels(len(codes)):
            fitted = replace(fitted, channels=fitted._best_shifts(codes, by_place=False))
        if len(self.places) > 1:
            fitted = replace(fitted, places=fitted._best_shifts(codes, by_place=True))
        return fitted

    def _best_rows(self, codes: Tensor) -> Tensor:
        at = _from_zero(torch.arange(-_NEAR, _NEAR + 1))
        best = _bits_by_shift(codes, self.rows[:, None] + self._columns(), at).argmin(dim=1)
        return (self.rows + at[best].to(self.rows)).clamp(0, CLASSES - 1)

    def _best_shifts(self, codes: Tensor, *, by_place: bool) -> Tensor:
        kept = self.channels[:, None] if by_place else self.places[None]
        shape = (len(self.rows), len(self.channels), len(self.places))
        base = (self.rows[:, None, None] + kept).expand(shape)
        axis = 2 if by_place else 1
        of_codes, of_rows = (v.view(shape).movedim(axis, 0).flatten(1) for v in (codes, base))
        at = _from_zero(torch.arange(-_SHIFTS // 2, _SHIFTS // 2))
        return at[_bits_by_shift(of_codes, of_rows, at).argmin(dim=1)]


def _from_zero(shifts: Tensor) -> Tensor:
    """The nearest of equally good ones comes first."""
    return shifts[shifts.abs().argsort(stable=True)]


def _bits_by_shift(codes: Tensor, classes: Tensor, shifts: Tensor) -> Tensor:
    """Bits of groups of codes, were all their classes shifted.

    A group's codes are counted once, by class and size, for all shifts; where a group has few, each
    is looked up for each shift. Either way the sums are exact, and so the same.

    Args:
        codes: [G, N], codes of G groups.
        classes: Their classes, [G, N]; may lie outside 0..CLASSES-1, whose ends stand for more.
        shifts: [S].

    Returns:
        float64 [G, S].
    """
    lowest, sizes = int(classes.min()), int(codes.abs().max()) + 1
    span = int(classes.max()) - lowest + 1
    reached = torch.arange(lowest, lowest + span) + shifts[:, None]
    lengths = code_lengths()[reached.clamp(0, CLASSES - 1), TOP : TOP + sizes].double().flatten(1)
    if codes.shape[1] * _LOOKED_UP < span * sizes:
        return _looked_up(codes, classes - lowest, lengths.view(len(shifts), span, sizes))
    totals, block = [], max(1, _COUNTS // (span * sizes))
    for part, part_classes in zip(
        torch.split(codes, block), torch.split(classes, block), strict=True
    ):
        group = torch.arange(len(part))[:, None] * span
        places = (group + (part_classes - lowest)) * sizes + part.abs().long()
        counts = places.flatten().bincount(minlength=len(part) * span * sizes)
        totals.append(counts.view(len(part), -1).double() @ lengths.T)
    return torch.cat(totals)


def _looked_up(codes: Tensor, classes: Tensor, lengths: Tensor) -> Tensor:
    """Bits of groups of few codes, under each of the tables.

    Args:
        codes: [G, N].
        classes: Rows of a table, [G, N].
        lengths: Bits by shift, class and size, float64 [S, span, sizes].

    Returns:
        float64 [G, S].
    """
    places = classes * lengths.shape[2] + codes.abs().long()
    return torch.stack([table.flatten()[places].sum(dim=1) for table in lengths], dim=1)


def _shifts_channels(rows: int) -> bool:
    return rows >= _FEW_ROWS


def _lengths(classes: Tensor, codes: Tensor) -> Tensor:
    """Bits of each code, shape of the codes."""
    return code_lengths().flatten()[classes * (2 * TOP + 1) + codes.long() + TOP]


def encode(codes: Tensor, places: int, coder: Coder | None = None) -> Tensor:
    """Write the codes of a layer.

    Args:
        codes: int8 [O, I * T], -127..127.
        places: T, places of the kernel.
        coder: A fast one; None for that of this package.

    Returns:
        Bytes, uint8 [n]: the classes, then the coder's.

    Raises:
        ConfigError: A code is -128.
    """
    if bool((codes < -TOP).any()):
        raise ConfigError(f"an entropy-coded layer has codes {-TOP}..{TOP}, and one is -128")
    codes = codes.cpu()
    classes = CodeClasses.of(codes, places)
    write = encode_run if coder is None else coder.encode
    each = classes.of_weights().flatten().to(torch.uint8)
    return torch.cat([_header(classes), write(codes.flatten(), each)])


def decode(
    stream: Tensor, shape: tuple[int, int], places: int, coder: Coder | None = None
) -> Tensor:
    """Inverse of `encode`.

    Args:
        stream: uint8 [n], all of a layer's bytes.
        shape: (O, I * T).
        places: T.
        coder: As of `encode`.

    Returns:
        int8 [O, I * T].

    Raises:
        ArtifactError: The bytes are not those of such a layer.
    """
    # a code takes at least -log2(4095 / 4096) bits: nothing is made of a size that is not there
    if shape[0] * shape[1] > len(stream) * _MOST_CODES:
        raise ArtifactError("codes: an entropy-coded layer ends too early; corrupted")
    if coder is not None:
        return coder.decode(stream, shape, places)
    classes, used = _read_header(stream, shape, places)
    each = classes.of_weights().flatten().to(torch.uint8)
    return decode_run(stream[used:], each).reshape(shape)


def _header(classes: CodeClasses) -> Tensor:
    shifts = [classes.channels] if _shifts_channels(len(classes.rows)) else []
    shifts += [classes.places] if len(classes.places) > 1 else []
    parts = [pack_bits(classes.rows.to(torch.uint8), _ROW_BITS)]
    if shifts:
        numbers = (torch.cat(shifts) + _SHIFTS // 2).to(torch.uint8)
        parts.append(pack_bits(numbers, _SHIFT_BITS))
    return torch.cat(parts)


def _read_header(stream: Tensor, shape: tuple[int, int], places: int) -> tuple[CodeClasses, int]:
    """Classes, and the bytes that told them."""
    rows, channels = shape[0], shape[1] // places
    counts = [channels if _shifts_channels(rows) else 0, places if places > 1 else 0]
    first, second = -(-rows * _ROW_BITS // 8), -(-sum(counts) * _SHIFT_BITS // 8)
    if len(stream) < first + second:
        raise ArtifactError("codes: an entropy-coded layer ends within its classes; corrupted")
    row_classes = unpack_bits(stream[:first], _ROW_BITS, rows).long()
    if bool((row_classes >= CLASSES).any()):
        raise ArtifactError("codes: a row has a class that there is not; corrupted")
    shifts = unpack_bits(stream[first : first + second], _SHIFT_BITS, sum(counts)).long()
    by_channel, by_place = (shifts - _SHIFTS // 2).split(counts)
    none = torch.zeros(channels, dtype=torch.int64)
    classes = CodeClasses(
        rows=row_classes,
        channels=by_channel if counts[0] else none,
        places=by_place if counts[1] else none.new_zeros(places),
    )
    return classes, first + second
