"""Cost against stored bits of one layer: what a price per bit buys, and the steps beyond it."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.codebook import LevelKind
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS, MAX_BITS
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS
from mpqdm_fx.numerics.levels.packing import SCALE_BITS, WIDTH_BITS

__all__ = ["CurvePoint", "LayerCurves", "Option"]

_WIDTHS = torch.arange(1, MAX_BITS + 1)


@dataclass(frozen=True, kw_only=True, order=True)
class Option:
    """One assignment of widths to a layer.

    Attributes:
        size: Stored bits, exact.
        cost: Sum of the channels' costs.
        levels: Kind of levels.
        steps: Steps taken on the curve of its kind, or -1 if it does not lie on that curve.
        widths: Width of each block, int64 [B].
    """

    size: int
    cost: float
    levels: LevelKind
    steps: int
    widths: Tensor = field(compare=False)


class CurvePoint(NamedTuple):
    """An option by its place: which equal width, or so many steps on the curve of a kind."""

    size: int
    place: int
    levels: LevelKind | None = None


class _Kind:
    """The curve of one kind of levels: steps of blocks along their lower hulls, best first."""

    def __init__(self, levels: LevelKind, width: int, channels: Tensor, costs: Tensor) -> None:
        self.levels = levels
        self.costs = costs  # float64 [B, 8]
        tables = torch.where(LEVEL_SETS[levels].stored(_WIDTHS), 8 * 2**_WIDTHS, 0)
        self.code_bits = channels[:, None] * (width * _WIDTHS)  # int64 [B, 8]
        self.table_bits = channels[:, None] * tables
        self.first, self.block, self.column, self.density = _hull_steps(
            self.code_bits + self.table_bits, costs
        )
        self.falling = -self.density
        start = torch.arange(len(costs)), self.first
        old = self._previous_columns()
        change = (self.block, self.column), (self.block, old)
        self.codes = _running(self.code_bits, start, change)
        self.tables = _running(self.table_bits, start, change)
        self.cost = _running(costs, start, change)

    def _previous_columns(self) -> Tensor:
        """Column that each step comes from: of the block's step before it, or its first."""
        order = torch.argsort(self.block, stable=True)
        column, block = self.column[order], self.block[order]
        old = self.first[block]
        follows = block[1:] == block[:-1]
        old[1:] = torch.where(follows, column[:-1], old[1:])
        return torch.empty_like(old).scatter_(0, order, old)

    def widths(self, steps: int) -> Tensor:
        """Width of each block after so many steps."""
        column = self.first.clone()
        # A block's later steps stand behind its earlier ones and go to larger sizes; the last
        # assignment must win, which scatter does not promise: take the last step of each block.
        last = torch.full_like(column, -1)
        last.scatter_reduce_(0, self.block[:steps], torch.arange(steps), "amax")
        moved = last >= 0
        column[moved] = self.column[last[moved]]
        return column + 1


def _running(
    table: Tensor, start: tuple[Tensor, Tensor], change: tuple[tuple[Tensor, Tensor], ...]
) -> Tensor:
    """Sum of a table's entries before each step, after it, ...: [steps + 1]."""
    first = table[start].sum()[None]
    return torch.cat([first, first + (table[change[0]] - table[change[1]]).cumsum(0)])


def _hull_steps(sizes: Tensor, costs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk all blocks along their lower hulls.

    Args:
        sizes: int64 [B, 8]; of a codebook not ascending, since a table of 4 bits may be larger
            than one bit more a weight.
        costs: float64 [B, 8].

    Returns:
        First column of each block [B]; block, column and density (cost saved per bit) of all steps,
        in descending density, a block's steps in their order.
    """
    rows = torch.arange(len(costs))
    # Smallest size, of equal sizes the least cost, of equal costs the first.
    smallest = sizes == sizes.amin(dim=1, keepdim=True)
    first = torch.where(smallest, costs, math.inf).argmin(dim=1)
    current = first
    limit = torch.full((len(costs),), math.inf, dtype=torch.float64)
    blocks, columns, densities = [], [], []
    for _ in range(MAX_BITS - 1):
        growth = sizes - sizes[rows, current][:, None]
        gain = costs[rows, current][:, None] - costs
        slope = torch.where((growth > 0) & (gain > 0), gain / growth, -1.0)
        best = slope.argmax(dim=1)
        density = slope[rows, best]
        moves = density > 0
        if not bool(moves.any()):
            break
        limit = torch.where(moves, torch.minimum(limit, density), limit)  # no rounding upwards
        current = torch.where(moves, best, current)
        blocks.append(rows[moves])
        columns.append(best[moves])
        densities.append(limit[moves])
    if not blocks:
        empty = torch.empty(0, dtype=torch.int64)
        return first, empty, empty, torch.empty(0, dtype=torch.float64)
    density = torch.cat(densities)
    order = torch.argsort(density, descending=True, stable=True)
    return first, torch.cat(blocks)[order], torch.cat(columns)[order], density[order]


class LayerCurves:
    """All that a layer can be: mixed or equal widths, uniform or codebook levels.

    Args:
        width: Weights of one channel K.
        uniform: float64 [O, 8].
        codebook: float64 [O, 4] or None.
        align: Channels of one block.
    """

    def __init__(self, width: int, uniform: Tensor, codebook: Tensor | None, align: int) -> None:
        self.channels = len(uniform)
        self.order = torch.arange(self.channels)
        if align > 1:
            # The geometric mean over the widths ranks alike in any unit.
            rank = uniform.clamp_min(1e-300).log().sum(dim=1)
            self.order = torch.argsort(rank, descending=True, stable=True)
        self.block_of = torch.arange(self.channels) // align
        sizes = torch.bincount(self.block_of)
        self.blocks = len(sizes)

        def blocked(costs: Tensor) -> Tensor:
            total = torch.zeros(self.blocks, costs.shape[1], dtype=torch.float64)
            return total.index_add_(0, self.block_of, costs[self.order])

        table = blocked(uniform)
        self.kinds = {"uniform": _Kind("uniform", width, sizes, table)}
        if codebook is not None:
            costs = torch.cat([blocked(codebook), table[:, CODEBOOK_MAX_BITS:]], dim=1)
            self.kinds["codebook"] = _Kind("codebook", width, sizes, costs)
        self.scale_bits = SCALE_BITS * self.channels
        self.tag_bits = 8 * (-(-WIDTH_BITS * self.channels // 8))
        self.equal = [
            self._option(kind, torch.full((self.blocks,), bits, dtype=torch.int64))
            for kind in self.kinds.values()
            for bits in range(1, MAX_BITS + 1)
        ]

    def bits(self, option: Option) -> Tensor:
        """Width of each channel, int64 [O]."""
        bits = torch.empty(self.channels, dtype=torch.int64)
        bits[self.order] = option.widths[self.block_of]
        return bits

    def at_price(self, price: float) -> CurvePoint:
        """Return the point of least ``cost + price * size``; of equal ones the smallest.

        A point on a curve counts width tags even where its widths happen to be equal; that
        assignment is among the equal ones, without tags.
        """
        least, best = math.inf, CurvePoint(size=0, place=0)
        for place, option in enumerate(self.equal):
            value = _value(option.cost, price, option.size)
            if value < least or (value == least and option.size < best.size):
                least, best = value, CurvePoint(size=option.size, place=place)
        for kind in self.kinds.values():
            # Only steps that save strictly more than the price: the smaller of equal ones.
            steps = int(torch.searchsorted(kind.falling, -price))
            size = self._mixed_size(kind, steps)
            value = _value(float(kind.cost[steps]), price, size)
            if value < least or (value == least and size < best.size):
                least, best = value, CurvePoint(size=size, levels=kind.levels, place=steps)
        return best

    def option(self, point: CurvePoint) -> Option:
        """Return the assignment of a point."""
        if point.levels is None:
            return self.equal[point.place]
        return self._on_curve(self.kinds[point.levels], point.place)

    def best_step(self, current: Option, beyond: Option, rest: int) -> tuple[float, Option] | None:
        """Return the step that lowers the cost most per bit and grows by at most ``rest`` bits.

        Args:
            current: Where the layer is.
            beyond: Another assignment that may be taken whole.
            rest: Bits left.

        Returns:
            Cost saved per bit (infinite for a step that takes no more bits) and the assignment
            after the step, or None if nothing helps.
        """
        kind = self.kinds[current.levels]
        offers = [beyond, *self.equal]
        offers += [
            self._option(alternative, current.widths)
            for alternative in self.kinds.values()
            if alternative.levels != current.levels
        ]
        if 0 <= current.steps < len(kind.density):
            offers.append(self._advance(kind, current, rest))
        moved = self._move_block(kind, current, rest)
        if moved is not None:
            offers.append(moved)
        best: tuple[float, Option] | None = None
        for option in offers:
            growth = option.size - current.size
            gain = current.cost - option.cost
            if growth > rest or not gain > _noise(current.cost):
                continue
            density = gain / growth if growth > 0 else math.inf
            if best is None or (density, gain) > (best[0], current.cost - best[1].cost):
                best = density, option
        return best

    def _mixed_size(self, kind: _Kind, steps: int) -> int:
        codes = 8 * (-(-int(kind.codes[steps]) // 8))
        return codes + int(kind.tables[steps]) + self.scale_bits + self.tag_bits

    def _on_curve(self, kind: _Kind, steps: int) -> Option:
        return self._option(kind, kind.widths(steps), steps)

    def _option(self, kind: _Kind, widths: Tensor, steps: int = -1) -> Option:
        index = torch.arange(self.blocks), widths - 1
        mixed = bool((widths != widths[0]).any())
        codes = 8 * (-(-int(kind.code_bits[index].sum()) // 8))
        return Option(
            size=codes
            + int(kind.table_bits[index].sum())
            + self.scale_bits
            + (self.tag_bits if mixed else 0),
            cost=float(kind.costs[index].sum()),
            levels=kind.levels,
            steps=steps,
            widths=widths,
        )

    def _advance(self, kind: _Kind, current: Option, rest: int) -> Option:
        """The next steps on the curve that save equally much per bit, as many as fit."""
        start = current.steps
        tied = torch.searchsorted(kind.falling, kind.falling[start], right=True)
        sizes = kind.codes + kind.tables
        room = sizes[start] + rest + self.tag_bits
        steps = int(torch.searchsorted(sizes[start + 1 : int(tied) + 1], room, right=True))
        option = self._on_curve(kind, start + max(1, steps))
        while steps > 1 and option.size - current.size > rest:  # padding and tags
            steps -= 1
            option = self._on_curve(kind, start + steps)
        return option

    def _move_block(self, kind: _Kind, current: Option, rest: int) -> Option | None:
        """The best move of one block to another width."""
        index = torch.arange(self.blocks), current.widths - 1
        codes_now, tables_now = kind.code_bits[index], kind.table_bits[index]
        codes = int(codes_now.sum()) + kind.code_bits - codes_now[:, None]
        growth = (codes + 7) // 8 * 8 + kind.table_bits - tables_now[:, None]
        growth = growth + int(tables_now.sum()) + self.scale_bits - current.size
        count = torch.bincount(current.widths - 1, minlength=MAX_BITS)
        remaining = count - torch.nn.functional.one_hot(current.widths - 1, MAX_BITS)
        equal = remaining == self.blocks - 1  # all the others have the width of this column
        growth = growth + torch.where(equal, 0, self.tag_bits)
        gain = kind.costs[index][:, None] - kind.costs
        helps = (gain > _noise(current.cost)) & (growth <= rest)
        if not bool(helps.any()):
            return None
        density = torch.where(helps, gain / growth.clamp_min(1e-9), -1.0)
        block, column = divmod(int(density.argmax()), MAX_BITS)
        widths = current.widths.clone()
        widths[block] = column + 1
        return self._option(kind, widths)


def _noise(cost: float) -> float:
    """Differences below this come from the order of a sum, not from a choice."""
    return 1e-12 * cost


def _value(cost: float, price: float, size: int) -> float:
    return float(size) if math.isinf(price) else cost + price * size
