"""The level sets of a layer's rows, and the nearest level of a value: what every rounding uses."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.codebook import LevelKind
from mpqdm_fx.numerics.levels.grids import (
    CODEBOOK_MAX_BITS,
    MAX_BITS,
    check_bits,
    round_scale,
)
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS

__all__ = ["ColumnSnapper", "RowLevels"]


@dataclass(frozen=True, kw_only=True)
class RowLevels:
    """2^b int8 levels times a scale for each row.

    Attributes:
        bits: Width of each row, int64 [O].
        scale: Positive bfloat16 values, float32 [O].
        tables: Integer levels of the rows of at most 4 bits, float32 [O, 16], ascending, the
            largest repeated; wider rows, whose levels are uniform, hold zeros. None if all rows
            have uniform levels.
    """

    bits: Tensor
    scale: Tensor
    tables: Tensor | None

    @classmethod
    def fit(
        cls, W: Tensor, bits: Tensor, kind: LevelKind, importance: Tensor | None = None
    ) -> Self:
        """Fit level sets to weights by weighted squared error.

        Args:
            W: Weight rows [O, K].
            bits: int64 [O], 1 to 8.
            kind: `"uniform"`, `"codebook"` for fitted levels in rows of at most 4 bits, or
                `"int4"` for the integers -8..7 in rows of 4 bits.
            importance: Error weights [K] or [O, K].

        Raises:
            ConfigError: Shapes or widths are wrong.
            CalibrationError: Weights or importance are not finite.
        """
        widths = check_bits(bits, len(W))
        narrow = bool((widths <= CODEBOOK_MAX_BITS).any())
        levels = LEVEL_SETS[kind if narrow else "uniform"]
        codes, scale = levels.quantize(W, widths, importance)
        return cls(bits=widths, scale=scale, tables=levels.tables(codes, widths))

    def split(self, rows: int) -> list[Self]:
        """The level sets of several matrices of so many rows each, that were fitted together.

        Args:
            rows: Rows of one matrix.
        """
        index = torch.arange(len(self.bits), device=self.scale.device)
        return [self.take(part) for part in torch.split(index, rows)]

    def take(self, rows: Tensor) -> Self:
        """The level sets of some of the rows.

        Args:
            rows: int64, their indices.
        """
        here = rows.to(self.scale.device)
        return replace(
            self,
            bits=self.bits[rows.to(self.bits.device)],
            scale=self.scale[here],
            tables=None if self.tables is None else self.tables[here],
        )

    @property
    def fitted(self) -> Tensor:
        """Which rows have a table, bool [O]."""
        if self.tables is None:
            return torch.zeros(len(self.bits), dtype=torch.bool)
        return self.bits <= CODEBOOK_MAX_BITS

    def with_scale(self, scale: Tensor) -> Self:
        """The same levels with other scales, rounded to bfloat16."""
        return replace(self, scale=round_scale(scale))

    def unclipped(self, W: Tensor) -> Self:
        """The same levels with scales at which the outermost one is each row's largest weight.

        Args:
            W: Weight rows [O, K]. Rows with a fitted table, and rows of zeros, keep their scale.
        """
        largest = W.abs().amax(dim=1).to(self.scale.device)
        top = torch.where(self.bits == MAX_BITS, 127, 2**self.bits - 1).to(self.scale)
        free = ~self.fitted.to(self.scale.device) & (largest > 0)
        return self.with_scale(torch.where(free, largest / top, self.scale))

    def snap(self, values: Tensor) -> Tensor:
        """The nearest level of each value.

        Args:
            values: [O, n], in units of the weights, float32 or float64.

        Returns:
            Codes, integers in the values' dtype [O, n]; the rounded values are
            `codes * scale[:, None]`. Halfway between two levels of equal distance either may come.
        """
        ratio = values / self.scale[:, None].to(values)
        codes = self._snap_uniform(ratio)
        if self.tables is None:
            return codes
        rows = self.fitted.nonzero()[:, 0].to(values.device)
        tables = self.tables.to(ratio)[rows]
        middle = (tables[:, 1:] + tables[:, :-1]) / 2
        index = torch.searchsorted(middle, ratio[rows].contiguous())
        codes[rows] = tables.gather(1, index)
        return codes

    def snapper(self, like: Tensor) -> "ColumnSnapper":
        """`snap` for one column after the other, prepared once.

        Args:
            like: Gives dtype and device of the columns.
        """
        return ColumnSnapper(self, like)

    def _snap_uniform(self, ratio: Tensor) -> Tensor:
        widths = self.bits.to(ratio.device)[:, None]
        top = torch.where(widths == MAX_BITS, 127, 2**widths - 1).to(ratio.dtype)
        balanced = ratio.mul(0.5).floor_().mul_(2).add_(1)
        wide = widths == MAX_BITS
        if bool(wide.any()):
            balanced = torch.where(wide, ratio.round(), balanced)
        return balanced.clamp_(-top, top)


class ColumnSnapper:
    """The nearest level of single columns: few small kernels.

    Rounding with error feedback meets one column at a time, and most of its time is the overhead of
    these calls. Columns are in units of twice the rows' scales, where balanced levels are a half
    away from whole numbers; halves and doubles of floats are exact.
    """

    def __init__(self, levels: RowLevels, like: Tensor) -> None:
        bits = levels.bits.to(like.device)
        top = torch.where(bits == MAX_BITS, 127, 2**bits - 1).to(like) / 2
        self._top, self._bottom = top, -top
        wide = bits == MAX_BITS
        self._wide = wide if bool(wide.any()) else None
        self._rows = self._tables = self._middle = None
        if levels.tables is not None:
            rows = levels.fitted.to(like.device).nonzero()[:, 0]
            tables = levels.tables.to(like)[rows] / 2
            self._tables = tables
            self._middle = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()
            self._rows = None if len(rows) == len(bits) else rows

    def __call__(self, values: Tensor, out: Tensor) -> None:
        """Write the levels nearest to one column.

        Args:
            values: The column [O], in the dtype that `like` had, in units of twice the scales.
            out: Where its levels go, in the same units.
        """
        if self._tables is not None and self._rows is None:
            out.copy_(self._fitted(values))
            return
        torch.floor(values, out=out)
        out.add_(0.5)
        if self._wide is not None:
            torch.where(self._wide, values.mul(2).round_().mul_(0.5), out, out=out)
        out.clamp_(self._bottom, self._top)
        if self._rows is not None:
            out[self._rows] = self._fitted(values[self._rows])

    def _fitted(self, values: Tensor) -> Tensor:
        assert self._tables is not None
        assert self._middle is not None
        index = torch.searchsorted(self._middle, values[:, None])
        return self._tables.gather(1, index)[:, 0]
