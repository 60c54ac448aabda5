"""What a kind of levels is: how it is fitted, which codes are legal, and how they are stored.

A channel of b bits has 2^b levels, integers within int8 times its scale. Every difference between
the kinds is here; whoever has a kind's name asks `LEVEL_SETS` for the rest.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError
from mpqdm_fx.numerics.levels.codebook import (
    LevelKind,
    code_ranks,
    codebook_tables,
    quantize_codebook,
)
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS, uniform_levels
from mpqdm_fx.numerics.levels.int4 import INT4_BITS, int4_levels, quantize_int4, snap_int4
from mpqdm_fx.numerics.solve.scales import quantize_uniform

__all__ = ["LEVEL_SETS", "TABLE_SIZE", "CodebookLevels", "Int4Levels", "UniformLevels"]

TABLE_SIZE = 2**CODEBOOK_MAX_BITS
"""Levels of the widest channel that may have a table."""


class UniformLevels:
    """Balanced levels: odd integers up to 2^b - 1, and -127..127 at 8 bits."""

    def quantize(
        self, W: Tensor, bits: Tensor, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fit weight rows [O, K]: codes int8 [O, K], scale float32 [O] (bfloat16 values)."""
        return quantize_uniform(W, bits, importance)

    def stored(self, widths: Tensor) -> Tensor:
        """Which channels have levels of their own, which are stored; bool, shape of the widths."""
        return torch.zeros_like(widths, dtype=torch.bool)

    def tables(self, codes: Tensor, widths: Tensor) -> Tensor | None:
        """Levels of the channels of at most 4 bits, float32 [O, 16]; None where all are balanced.

        Args:
            codes: int8 [O, K], fitted.
            widths: int64 [O].

        Returns:
            Ascending, the largest repeated; zeros for wider channels.
        """
        return None

    def levels_of(self, row: Tensor, width: int) -> Tensor | None:
        """Levels of one channel, float32 ascending; None where they are the balanced ones.

        Args:
            row: Its codes, int8 [K].
            width: Its bits.
        """
        return None

    def legal(self, codes: Tensor, widths: Tensor) -> bool:
        """Whether all codes [O, K] are levels of their channels."""
        return bool(self._fits(codes.int(), widths[:, None]).all())

    def _fits(self, codes: Tensor, widths: Tensor) -> Tensor:
        top = torch.where(widths == MAX_BITS, 127, 2**widths - 1)
        odd = (codes % 2 != 0) | (widths == MAX_BITS)
        return odd & (codes.abs() <= top)

    def index(self, codes: Tensor, width: int, channels: Tensor) -> Tensor:
        """Place of each code among its levels, uint8 [n, K].

        Args:
            codes: int8 [n, K], of channels of one width.
            width: Their bits.
            channels: int64 [n], their numbers, for messages.

        Raises:
            ConfigError: A code is no level.
        """
        top = 127 if width == MAX_BITS else 2**width - 1
        wide = codes.to(torch.int16)
        legal = wide.abs() <= top
        if width < MAX_BITS:
            legal &= wide.bitwise_and(1) == 1
        if not bool(legal.all()):
            channel = int(channels[(~legal).any(dim=1)][0])
            raise ConfigError(
                f"codes of channel {channel} are not balanced {width}-bit levels; "
                "quantize with quantize_uniform, or pack with levels='codebook'"
            )
        wide += top
        return (wide if width == MAX_BITS else wide >> 1).to(torch.uint8)

    def codes(self, index: Tensor, width: int, tables: Tensor) -> Tensor:
        """Inverse of `index`, int8 [n, K].

        Args:
            index: uint8 [n, K].
            width: Bits of the channels.
            tables: int8 [n, 2^b], what is stored of their levels; may be empty.

        Raises:
            ArtifactError: An index is no level.
        """
        wide = index.to(torch.int16)
        if width < MAX_BITS:
            return (2 * wide - ((1 << width) - 1)).to(torch.int8)
        if bool((index == 255).any()):
            raise ArtifactError("codes: 8-bit index 255 is no level; the file is corrupted")
        return (wide - 127).to(torch.int8)


class CodebookLevels(UniformLevels):
    """Fitted levels in channels of at most 4 bits, balanced ones in others."""

    def quantize(
        self, W: Tensor, bits: Tensor, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `UniformLevels.quantize`."""
        return quantize_codebook(W, bits, importance)

    def stored(self, widths: Tensor) -> Tensor:
        """See `UniformLevels.stored`."""
        return widths <= CODEBOOK_MAX_BITS

    def tables(self, codes: Tensor, widths: Tensor) -> Tensor | None:
        """See `UniformLevels.tables`; from the levels that the codes use."""
        result = torch.zeros(len(codes), TABLE_SIZE, device=codes.device)
        for width in _narrow(widths):
            rows = (widths == width).nonzero()[:, 0]
            table = codebook_tables(codes[rows], widths[rows]).float()
            result[rows] = _filled(table)
        return result

    def levels_of(self, row: Tensor, width: int) -> Tensor | None:
        """See `UniformLevels.levels_of`."""
        return torch.unique(row).float() if width <= CODEBOOK_MAX_BITS else None

    def legal(self, codes: Tensor, widths: Tensor) -> bool:
        """See `UniformLevels.legal`."""
        distinct = torch.tensor([row.unique().numel() for row in codes])
        return bool((distinct <= 2**widths).all())

    def index(self, codes: Tensor, width: int, channels: Tensor) -> Tensor:
        """See `UniformLevels.index`."""
        if width > CODEBOOK_MAX_BITS:
            return super().index(codes, width, channels)
        return code_ranks(codes, torch.full((len(codes),), width))

    def codes(self, index: Tensor, width: int, tables: Tensor) -> Tensor:
        """See `UniformLevels.codes`."""
        if width > CODEBOOK_MAX_BITS:
            return super().codes(index, width, tables)
        return tables.gather(1, index.to(torch.int64))


class Int4Levels(UniformLevels):
    """The integers -8..7 in channels of 4 bits, balanced levels in others."""

    def quantize(
        self, W: Tensor, bits: Tensor, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `UniformLevels.quantize`."""
        return quantize_int4(W, bits, importance)

    def tables(self, codes: Tensor, widths: Tensor) -> Tensor | None:
        """See `UniformLevels.tables`."""
        if not bool((widths == INT4_BITS).any()):
            return None
        result = torch.zeros(len(codes), TABLE_SIZE, device=codes.device)
        for width in _narrow(widths):
            levels = int4_levels() if width == INT4_BITS else uniform_levels(width)
            rows = (widths == width).nonzero()[:, 0].to(result.device)
            result[rows] = _filled(levels.to(result)[None])[0]
        return result

    def levels_of(self, row: Tensor, width: int) -> Tensor | None:
        """See `UniformLevels.levels_of`."""
        return int4_levels().float() if width == INT4_BITS else None

    def _fits(self, codes: Tensor, widths: Tensor) -> Tensor:
        inside = (codes >= -8) & (codes <= 7)
        return torch.where(widths == INT4_BITS, inside, super()._fits(codes, widths))

    def index(self, codes: Tensor, width: int, channels: Tensor) -> Tensor:
        """See `UniformLevels.index`."""
        if width != INT4_BITS:
            return super().index(codes, width, channels)
        outside = (snap_int4(codes.float()) != codes).any(dim=1)
        if bool(outside.any()):
            raise ConfigError(
                f"codes of channel {int(channels[outside][0])} are not within -8..7; quantize "
                "with quantize_int4"
            )
        return (codes.to(torch.int16) + 8).to(torch.uint8)

    def codes(self, index: Tensor, width: int, tables: Tensor) -> Tensor:
        """See `UniformLevels.codes`."""
        if width != INT4_BITS:
            return super().codes(index, width, tables)
        return (index.to(torch.int16) - 8).to(torch.int8)


LEVEL_SETS: Mapping[LevelKind, UniformLevels] = {
    "uniform": UniformLevels(),
    "codebook": CodebookLevels(),
    "int4": Int4Levels(),
}
"""Every kind of levels by its name."""


def _narrow(widths: Tensor) -> list[int]:
    """Widths of the channels that may have a table."""
    return sorted({width for width in widths.tolist() if width <= CODEBOOK_MAX_BITS})


def _filled(levels: Tensor) -> Tensor:
    """Rows of levels [n, L] with the largest repeated up to the size of a table."""
    return torch.cat([levels, levels[:, -1:].expand(-1, TABLE_SIZE - levels.shape[1])], dim=1)
