"""Modules with trainable roundings: they compute what the frozen ones compute, bit for bit.

Trained are the parts that cost nothing at run time: low-rank factors that are merged before the
weight is rounded (QALoRA, EfficientDM, arXiv 2310.03270, section 3.2), the step of every channel,
the levels of fitted tables, biases, and the ranges of activations (`trainable_ranges`). Codes are
legal at every moment: each forward chooses them anew.

Rows of codebooks, and rows of -8..7 (`"int4"`), have tables; the others have the uniform levels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpqdm_fx.numerics.halves import fits_half
from mpqdm_fx.numerics.levels.grids import MAX_BITS, snap
from mpqdm_fx.numerics.levels.level_sets import LEVEL_SETS
from mpqdm_fx.numerics.solve.stochastic import stochastic_codes
from mpqdm_fx.numerics.training.straight_through import (
    round_half_ste,
    round_scale_ste,
    round_ste,
    table_values,
    values_of_codes,
)
from mpqdm_fx.records.plan import LayerPlan

__all__ = ["FrozenLayer", "TrainableLayer", "cell_base", "row_tables"]

# Shares of a cell's half width: how near to the border a weight may start.
_INSIDE = 0.9
_TOP = 127


@dataclass(frozen=True, kw_only=True)
class FrozenLayer:
    """What a trained layer became.

    Attributes:
        codes: int8, shape of the weight.
        scale: float32 [O], bfloat16 values.
        bias: float [O], or None.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None


class TrainableLayer(nn.Module):
    """A rounded layer whose codes can be trained.

    Args:
        rounded: Layer with `weight_codes` and `weight_scale`; it is not changed.
        planned: Its widths and kind of levels.
        base: Weight rows [O, K] whose rounding gives the layer's codes; see `cell_base`. None takes
            the rounded rows themselves, which move with the trained step: a fixed weight that lies
            on the grid would leave the straight-through gradient of the step no first order.
        rank: Rank of the trained change of the base, 0 for none.
        train_levels: Train fitted levels too.
        generator: Draws the low-rank factors.

    Shapes: `down` [rank, K] and `up` [O, rank]; `log_scale` [O], in natural logarithms over the
    scale at the start; `levels` [rows with a table, L] in units of the scale, of which a row uses
    its first ones.

    Attributes:
        draw: Seed by which the weight is rounded stochastically; None rounds to the nearest level.
    """

    start_scale: Tensor
    base: Tensor
    table_rows: Tensor
    table_places: Tensor
    reach: Tensor
    bits: Tensor

    def __init__(
        self,
        rounded: nn.Module,
        planned: LayerPlan,
        base: Tensor | None,
        *,
        rank: int,
        train_levels: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.inner = rounded
        self.planned = planned
        self.draw: int | None = None
        codes, scale = rounded.weight_codes, rounded.weight_scale
        assert isinstance(codes, Tensor)
        assert isinstance(scale, Tensor)
        self._in_steps = base is None
        self.register_buffer(
            "base", (codes.flatten(1) if base is None else base).float(), persistent=False
        )
        rows, width = self.base.shape
        self.register_buffer("start_scale", scale.clone(), persistent=False)
        self.log_scale = nn.Parameter(torch.zeros(rows))
        self.rank = min(rank, rows, width)
        if self.rank:
            bound = math.sqrt(3 / width)  # unit variance of a sum over the columns
            down = torch.rand(self.rank, width, generator=generator) * 2 * bound - bound
            self.down = nn.Parameter(down)
            self.up = nn.Parameter(torch.zeros(rows, self.rank))
        bias = getattr(rounded, "bias", None)
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None
        # what was stored in half precision stays there: the plan has counted its bytes
        self._half = isinstance(bias, Tensor) and fits_half(bias)
        self._add_tables(train_levels)
        bits = planned.bits_tensor()
        # half a spacing, of 1 or of 2, beyond the outermost level
        reach = torch.where(bits == MAX_BITS, _TOP + 0.5, 2.0**bits)
        self.register_buffer("reach", reach, persistent=False)
        self.register_buffer("bits", bits, persistent=False)

    def _add_tables(self, train_levels: bool) -> None:
        """Rows with a table: which they are, their levels, ascending, and which level is where."""
        tables = row_tables(self.planned, self.inner)
        rows = torch.tensor(sorted(tables), dtype=torch.int64)
        self.register_buffer("table_rows", rows, persistent=False)
        counts = torch.tensor([len(tables[row]) for row in sorted(tables)], dtype=torch.int64)
        longest = int(counts.max()) if tables else 0
        # beyond a row's own levels its last one is repeated, and stays the same one in training
        places = torch.arange(longest).minimum(counts[:, None] - 1)
        self.register_buffer("table_places", places, persistent=False)
        levels = torch.zeros(len(tables), longest)
        for index, row in enumerate(sorted(tables)):
            levels[index] = tables[row][places[index]]
        fitted = train_levels and self.planned.levels == "codebook" and bool(tables)
        self.levels = nn.Parameter(levels, requires_grad=fitted)

    @property
    def scale(self) -> Tensor:
        """Step of each row [O], float32, a bfloat16 value."""
        return round_scale_ste(self.start_scale * self.log_scale.exp())

    def merged(self) -> Tensor:
        """Weight rows before rounding [O, K]."""
        base = self.base * self.scale[:, None] if self._in_steps else self.base
        if not self.rank:
            return base
        with torch.autocast(base.device.type, enabled=False):  # the codes are those of float32
            return base + self.up @ self.down

    def table(self) -> Tensor:
        """Levels of the rows with a table [rows, L]: whole numbers, ascending."""
        levels = self.levels.gather(1, self.table_places)
        return round_ste(levels).clamp(-_TOP, _TOP).sort(dim=1).values

    def weight_rows(self) -> Tensor:
        """Rounded weight rows [O, K], on their grid exactly."""
        merged, scale, draws = self.merged(), self.scale, self._draws()
        rows = self.table_rows
        if len(rows) == len(merged):
            return table_values(merged, scale, self.table(), draws)
        if draws is None:
            codes = snap(merged, scale.detach(), self.bits)
        else:
            codes = stochastic_codes(merged, scale.detach(), self.bits, draws)
        values = values_of_codes(merged, scale, codes, self.reach)
        if not len(rows):
            return values
        some = None if draws is None else draws[rows]
        fitted = table_values(merged[rows], scale[rows], self.table(), some)
        return values.index_copy(0, rows, fitted)

    def _draws(self) -> Tensor | None:
        if self.draw is None:
            return None
        # a generator of its own: where the pass is computed again, it finds the same codes
        generator = torch.Generator(self.base.device).manual_seed(self.draw)
        return torch.rand(self.base.shape, generator=generator, device=self.base.device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the rounded weight."""
        tensors = {"weight": self.weight_rows().reshape(self.planned.shape)}
        if self.bias is not None:
            tensors["bias"] = self._stored(self.bias)
        result: Tensor = torch.func.functional_call(self.inner, tensors, (x,))
        return result

    def _stored(self, bias: Tensor) -> Tensor:
        return round_half_ste(bias) if self._half else bias

    @torch.no_grad()
    def frozen(self) -> FrozenLayer:
        """Codes, scales and bias as they are now."""
        scale = self.scale
        codes = (self.weight_rows() / scale[:, None]).round().to(torch.int8)
        bias = None if self.bias is None else self._stored(self.bias.detach()).clone()
        return FrozenLayer(codes=codes.reshape(self.planned.shape), scale=scale.clone(), bias=bias)


def row_tables(planned: LayerPlan, rounded: nn.Module) -> dict[int, Tensor]:
    """Levels by row, for the rows whose levels are not the uniform ones.

    Args:
        planned: Widths and kind of levels of a layer.
        rounded: The layer, with `weight_codes`.

    Returns:
        float32 [L], ascending whole numbers, for each such row.
    """
    codes = rounded.weight_codes
    assert isinstance(codes, Tensor)
    levels = LEVEL_SETS[planned.levels]
    rows = zip(codes.flatten(1), planned.bits, strict=True)
    tables = {index: levels.levels_of(row, width) for index, (row, width) in enumerate(rows)}
    return {index: table for index, table in tables.items() if table is not None}


def cell_base(
    codes: Tensor, scale: Tensor, weight: Tensor, bits: Tensor, tables: Mapping[int, Tensor]
) -> Tensor:
    """The point nearest to a float weight among all that round to given codes.

    What rounding with error feedback chose is kept, and how near a weight is to another code too:
    training starts at the quantized model and not at a nearest rounding of the float one.

    Args:
        codes: int8 [O, K].
        scale: float32 [O].
        weight: Float weight rows [O, K].
        bits: Width of each row, int64 [O].
        tables: Levels of the rows that have others than the uniform ones; see `row_tables`.

    Returns:
        float32 [O, K].
    """
    ratio = weight.float() / scale[:, None]
    exact = codes.float()
    half = torch.where(bits == MAX_BITS, 0.5, 1.0)[:, None]
    low, high = exact - _INSIDE * half, exact + _INSIDE * half
    result = ratio.clamp(low, high) * scale[:, None]
    for row, levels in tables.items():
        gaps = levels.diff().div(2)
        below = torch.cat([torch.ones(1), gaps]) * _INSIDE
        above = torch.cat([gaps, torch.ones(1)]) * _INSIDE
        place = torch.searchsorted(levels, exact[row])
        low, high = exact[row] - below[place], exact[row] + above[place]
        result[row] = ratio[row].clamp(low, high) * scale[row]
    return result
