"""Scales of uniform levels: the search for the step that costs each row of weights least."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.grids import (
    MAX_BITS,
    MIN_SCALE,
    check_bits,
    max_scale,
    round_scale,
    scales_around,
    snap,
    snap_ratio,
    top_level,
    uniform_levels,
)
from mpqdm_fx.numerics.solve.rows import (
    SortedRows,
    check_importance,
    check_weight,
    exponents,
    importance_of,
    powers_of_two,
    row_chunks,
    unit_importance,
)

__all__ = ["quantize_uniform", "uniform_scales"]

_FLOAT_MAX = torch.finfo(torch.float32).max
_HALVINGS = {2: 6, 3: 6, 4: 6, 5: 6, 6: 6, 7: 5, 8: 5}  # of the searched interval of scales
_KEPT = 3  # best candidates of the coarse search that are refitted
_REFITS = 3
_WIDE = 6  # from this width on, more bfloat16 neighbours of a refitted scale are tried
_PRUNED = 4  # from this width on, bounds are worth more than they cost
_ROUNDING = 1e-11  # of a row's energy: far above what rounding does to sums
_DIRECT = 12  # rows shorter than this times their levels are evaluated weight by weight
_CACHED = 2**16  # numbers that such an evaluation works on at once


def quantize_uniform(
    W: Tensor, bits: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize weight rows onto balanced uniform levels, each at its own width.

    Per row the scale minimises ``sum_k h_k (w_k - s q_k)^2`` over a grid of shrinks of the row's
    maximum; the best are refitted by least squares (``s = <w, q>_h / <q, q>_h``, codes snapped
    anew) and compared at bfloat16 values around them. Invariants:

    - ``codes == snap(W, scale, bits)`` and ``scale == round_scale(scale)``;
    - a row that already lies on a grid comes back with error 0 (with its own codes and scale if
      it uses the outermost level);
    - scaling a row by ``2^k`` scales its scale and leaves its codes, bit for bit, inside the
      normal bfloat16 range; rows do not influence each other;
    - a row of zeros gets ``MIN_SCALE``: balanced levels have no zero, and 1e-38 is one in effect.

    Args:
        W: Weight rows [O, K], any float dtype (taken as float32), finite.
        bits: int64 [O], 1 to 8 each.
        importance: Error weights h >= 0, [K] or [O, K]; None for equal ones. Only ratios within a
            row matter; a row whose important weights are all zero is fitted with equal ones.

    Returns:
        codes int8 [O, K] and scale float32 [O].

    Raises:
        ConfigError: Shapes or widths are wrong.
        CalibrationError: Weights or importance are not finite, or importance is negative.
    """
    rows = check_weight(W)
    widths = check_bits(bits, len(rows))
    if importance is not None:
        importance = check_importance(importance, rows.shape)
    scale = _scales(rows, widths, importance)
    return snap(rows, scale, widths), scale


def uniform_scales(W: Tensor, importance: Tensor | None = None) -> Tensor:
    """Scales of `quantize_uniform` at every width, which share what does not depend on it.

    Args:
        W: Weight rows [O, K], as there.
        importance: Error weights, as there.

    Returns:
        float32 [8, O], of 1 to 8 bits.

    Raises:
        ConfigError: Shapes are wrong.
        CalibrationError: Weights or importance are not finite, or importance is negative.
    """
    rows = check_weight(W)
    if importance is not None:
        importance = check_importance(importance, rows.shape)
    parts = []
    for part in row_chunks(*rows.shape):
        index = torch.arange(len(rows), device=rows.device)[part]
        search = _ScaleSearch.of(rows[part], importance_of(importance, index))
        parts.append(torch.stack([search.scale(bits) for bits in range(1, MAX_BITS + 1)]))
    return torch.cat(parts, dim=1)


def _scales(rows: Tensor, widths: Tensor, importance: Tensor | None) -> Tensor:
    """Best scale of each row at its own width, float32 [O]."""
    scale = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in row_chunks(*rows.shape):
        index = torch.arange(len(rows), device=rows.device)[part]
        search = _ScaleSearch.of(rows[part], importance_of(importance, index))
        for width in sorted(set(widths[part].tolist())):
            members = (widths[part] == width).nonzero()[:, 0].to(rows.device)
            scale[index[members]] = search.take(members).scale(width)
    return scale


@dataclass(frozen=True, kw_only=True)
class _ScaleSearch:
    """Rows made ready for a scale search at any width.

    Attributes:
        exact: ``|W|``, float64 [n, K].
        maximum: Largest of each row, float64 [n].
        power: Power of two of each row, float64 [n].
        unit: Magnitudes over it that count, in [0, 1), float32 [n, K].
        h: Importance, float32 [n, K], or None.
        mean: Weighted mean of ``unit``, float64 [n].
        ordered: ``unit`` sorted.
    """

    exact: Tensor
    maximum: Tensor
    power: Tensor
    unit: Tensor
    h: Tensor | None
    mean: Tensor
    ordered: SortedRows

    @classmethod
    def of(cls, W: Tensor, importance: Tensor | None) -> Self:
        magnitude = W.abs()
        exact = magnitude.to(torch.float64)
        h = unit_importance(importance, magnitude)
        counting = exact
        if h is not None:  # a weight of no importance may be clipped: it must not set the range
            counting = exact * (h > 0)
        # |row| / power lies in [1/2, 1)
        power = powers_of_two(exponents(counting.amax(dim=1)))
        unit = (counting / power[:, None]).to(torch.float32)
        if h is None:
            mean = unit.mean(dim=1, dtype=torch.float64)
        else:
            mean = (h * unit).sum(dim=1, dtype=torch.float64) / h.sum(dim=1, dtype=torch.float64)
        return cls(
            exact=exact,
            maximum=exact.amax(dim=1),
            power=power,
            unit=unit,
            h=h,
            mean=mean,
            ordered=SortedRows.of(unit, h),
        )

    def take(self, rows: Tensor) -> "_ScaleSearch":
        """Some of the rows."""
        if len(rows) == len(self.power):
            return self
        return _ScaleSearch(
            exact=self.exact[rows],
            maximum=self.maximum[rows],
            power=self.power[rows],
            unit=self.unit[rows],
            h=None if self.h is None else self.h[rows],
            mean=self.mean[rows],
            ordered=self.ordered.take(rows),
        )

    def scale(self, bits: int) -> Tensor:
        """The best scale of each row, float32 [n]."""
        index = torch.arange(len(self.power), device=self.power.device)
        parts = row_chunks(len(index), 2 ** _HALVINGS.get(bits, 0) * 2**bits)
        return torch.cat([self.take(index[part])._scale(bits) for part in parts])

    def _scale(self, bits: int) -> Tensor:
        best = torch.where(self.ordered.values[:, -1] > 0, self._search(bits) * self.power, 0.0)
        scale = round_scale(best).clamp(max=max_scale(top_level(bits)))
        grid_scale, on_grid = _grid_scale(self.exact, self.maximum, bits)
        return torch.where(on_grid, grid_scale, scale)

    def _search(self, bits: int) -> Tensor:
        """The best bfloat16 scale for the unit rows, as float64 [n]."""
        if bits == 1:  # closed form: the weighted mean magnitude, whatever the codes
            return round_scale(self.mean).to(torch.float64)
        levels = uniform_levels(bits).to(self.unit.device, torch.float64)
        levels = levels[levels >= 0]
        # A least-squares scale is at least (weighted mean magnitude) / top: <|w|,|q|> >= m1 sum |q|
        # because |q| grows with |w|, and <q,q> <= top sum |q|. Above, one octave over the maximum.
        low = (self.mean / levels[-1]).clamp_min(1e-100)
        high = self.ordered.values[:, -1].to(torch.float64) / levels[(len(levels) - 1) // 2]
        scale = torch.stack([low, torch.maximum(low, high)], dim=1)
        for _ in range(_HALVINGS[bits]):  # geometric; sqrt rounds alike in every row, pow does not
            middle = (scale[:, 1:] * scale[:, :-1]).sqrt()
            between = torch.stack([scale[:, :-1], middle], dim=2).flatten(1)
            scale = torch.cat([between, scale[:, -1:]], dim=1)
        direct = self.unit.shape[1] <= _DIRECT * len(levels)
        errors: _Errors = partial(_sorted_errors, self.ordered, levels)
        if direct:
            h = torch.ones_like(self.unit) if self.h is None else self.h
            errors = partial(_direct_errors, self.unit, h, bits)
        few = bits >= _PRUNED
        error, refit = (
            _hopeful_errors(errors, self.ordered, levels, scale) if few else errors(scale)
        )
        scale = refit.gather(1, error.topk(_KEPT, dim=1, largest=False).indices)
        for _ in range(_REFITS - 1):
            _, scale = errors(scale)
        reach = 8 if bits >= _WIDE else 3  # wide levels: many narrow valleys around a scale
        around = scales_around(scale, -reach, reach).flatten(1)
        if few:
            around = _without_repeats(around)
        error, _ = errors(around)
        return around.gather(1, error.argmin(dim=1, keepdim=True))[:, 0]


_Errors = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(squared error, least-squares refit) float64 [n, C] of scales [n, C]."""


def _hopeful_errors(
    errors: _Errors, rows: SortedRows, levels: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`errors` of ascending scales that can be among the `_KEPT` best; infinity for the others.

    What a scale clips is at least `(sum of h (|w| - top))^2 / sum of h`, over the weights above its
    outermost level `top` (Cauchy and Schwarz); few scales clip less than the third best errs.
    """
    mass, total = rows.all()
    top = levels[-1] * scale
    mass_below, total_below = rows.below(top)
    above, beyond = mass[:, None] - mass_below, total[:, None] - total_below
    bound = (beyond - top * above).clamp_min(0).square() / above.clamp_min(1e-300)
    spacing = (levels[1] - levels[0]) * scale
    likely = bound + mass[:, None] * spacing.square() / 12
    first = likely.topk(2 * _KEPT, dim=1, largest=False).indices.sort(dim=1).values
    error, refit = torch.full_like(scale, torch.inf), scale.clone()

    def evaluate(places: Tensor) -> None:
        for whole, part in zip((error, refit), errors(scale.gather(1, places)), strict=True):
            whole.scatter_(1, places, part)

    evaluate(first)
    third = error.topk(_KEPT, dim=1, largest=False).values[:, -1:]
    hopeful = (bound <= third + _ROUNDING * rows.energy[:, None]) & error.isinf()
    count = int(hopeful.sum(dim=1).max())
    if count:  # as many for each row: some of the hopeless in addition
        evaluate(hopeful.to(torch.uint8).topk(count, dim=1).indices.sort(dim=1).values)
    return error, refit


def _without_repeats(scale: Tensor) -> Tensor:
    """The distinct scales of each row [n, C], ascending, the last ones repeated."""
    scale = scale.sort(dim=1).values
    places = torch.nn.functional.pad((scale.diff(dim=1) > 0).cumsum(dim=1), (1, 0))
    result = scale[:, -1:].expand(-1, int(places.max()) + 1).clone()
    return result.scatter_(1, places, scale)


def _direct_errors(unit: Tensor, h: Tensor, bits: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (squared error, least-squares refit) float64 [n, C] of scales, weight by weight."""
    sums = torch.empty(3, *scale.shape, device=scale.device)
    # few enough numbers at once that they stay in the cache
    rows = max(1, _CACHED // (scale.shape[1] * unit.shape[1]))
    step = scale.to(torch.float32)
    for start in range(0, len(unit), rows):
        part = slice(start, start + rows)
        trial, row, weight = step[part, :, None], unit[part, None, :], h[part, None, :]
        q = snap_ratio(row / trial, bits).to(torch.float32)  # [n, C, K]
        weighted = weight * q
        torch.sum(weighted * row, dim=2, out=sums[0, part])
        torch.sum(weighted.mul_(q), dim=2, out=sums[1, part])
        off = q.mul_(trial).sub_(row).square_().mul_(weight)
        torch.sum(off, dim=2, out=sums[2, part])
    cross, power, error = sums.to(torch.float64)
    refit = cross / power.clamp_min(1e-300)
    return error, torch.where(power > 0, refit, scale)


def _sorted_errors(rows: SortedRows, levels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same from running sums, in one look-up per level [L] >= 0 and scale [n, C]."""
    mass, total = rows.all()
    # [n, L - 1, C]: scales ascend, and looking up what ascends is several times as fast
    threshold = ((levels[1:] + levels[:-1]) / 2)[:, None] * scale[:, None, :]
    mass_below, total_below = rows.below(threshold)
    # sum of h |w| q and h q q, level by level: whatever reaches a threshold gains one level
    cross = levels.diff() @ (total[:, None, None] - total_below) + levels[0] * total[:, None]
    power = levels.square().diff() @ (mass[:, None, None] - mass_below)
    power = power + levels[0].square() * mass[:, None]
    error = rows.energy[:, None] - scale * (2 * cross - scale * power)
    return error, torch.where(power > 0, cross / power.clamp_min(1e-300), scale)


def _grid_scale(exact: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find rows that lie on a grid already: (scale float32 [n], on_grid bool [n]).

    The maximum of such a row is a level times a bfloat16 scale, which few rows satisfy; only
    those are compared element by element, finest scale first.

    Args:
        exact: ``|W|``, float64 [n, K].
        maximum: Largest of each row, float64 [n].
        bits: Width of the rows.
    """
    levels = uniform_levels(bits).to(exact.device, torch.float64)
    levels = levels[levels > 0].flip(0)
    scales = round_scale(maximum[:, None] / levels).to(torch.float64)  # [n, L]
    possible = (scales * levels == maximum[:, None]) & (scales * levels[0] <= _FLOAT_MAX)
    scale = torch.full_like(maximum, MIN_SCALE)
    rows, level = possible.nonzero(as_tuple=True)  # by row, then by level
    for columns in (slice(0, 8), slice(0, 64), slice(None)):  # a few elements refuse most of them
        parts = row_chunks(len(rows), len(range(*columns.indices(exact.shape[1]))))
        checks = [
            _lies_on(exact[rows[part]][:, columns], scales[rows[part], level[part]], bits)
            for part in parts
        ]
        matches = torch.cat(checks) if checks else torch.zeros(0, dtype=torch.bool)
        rows, level = rows[matches], level[matches]
    # backwards, so that each row ends with its finest scale
    scale[rows.flip(0)] = scales[rows, level].flip(0)
    on_grid = maximum == 0
    on_grid[rows] = True
    return scale.to(torch.float32), on_grid


def _lies_on(exact: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Which rows [n, K] of magnitudes are levels times their scale [n], bool [n]."""
    trial = scale[:, None]
    codes = snap_ratio((exact / trial).to(torch.float32), bits).to(torch.float64)
    return (codes * trial == exact).all(dim=1)
