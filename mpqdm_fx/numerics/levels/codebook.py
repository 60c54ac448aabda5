"""Fitted level sets inside int8: per channel 2^b int8 values times a bfloat16 scale.

Error-weighted Lloyd (S. Lloyd, "Least squares quantization in PCM", 1982; J. Max, 1960) on each
row, all rows and several starts at once, then the centroids are moved onto int8 values.
"""

from typing import Literal

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.levels.grids import (
    CODEBOOK_MAX_BITS,
    check_bits,
    dequantize,
    max_scale,
    round_scale,
    scales_around,
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
from mpqdm_fx.numerics.solve.scales import quantize_uniform

__all__ = ["LevelKind", "code_ranks", "codebook_tables", "quantize_codebook"]

LevelKind = Literal["uniform", "codebook", "int4"]

_LLOYD_STEPS = 40
_KEPT = 2  # Lloyd solutions whose values are moved to int8
_SCALES = 4  # scales kept per solution
_POLISH = 3  # Lloyd steps on int8 values
_TOP = 127


def quantize_codebook(
    W: Tensor, bits: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize weight rows onto level sets fitted to each row.

    A row of b <= 4 bits gets at most 2^b int8 values, fitted by error-weighted Lloyd; a wider row
    is uniform. The uniform solution is always a candidate, compared in float64 on the final
    dequantized values, so the weighted squared error is never above that of `quantize_uniform`.
    Rows do not influence each other; a power of two scales the scale and leaves the codes.

    Args:
        W: Weight rows [O, K], any float dtype (taken as float32), finite.
        bits: int64 [O], 1 to 8 each.
        importance: Error weights h >= 0, [K] or [O, K]; None for equal ones.

    Returns:
        codes int8 [O, K] in -127..127 and scale float32 [O] (bfloat16 values).

    Raises:
        ConfigError: Shapes or widths are wrong.
        CalibrationError: Weights or importance are not finite, or importance is negative.
    """
    rows = check_weight(W)
    codes, scale = quantize_uniform(rows, bits, importance)
    if importance is not None:
        importance = check_importance(importance, rows.shape)
    widths = check_bits(bits, len(rows))
    for width in sorted({b for b in widths.tolist() if b <= CODEBOOK_MAX_BITS}):
        members = (widths == width).nonzero()[:, 0].to(rows.device)
        for part in row_chunks(len(members), max(rows.shape[1], 256 * 2**width)):
            index = members[part]
            h = importance_of(importance, index)
            codes[index], scale[index] = _fit(rows[index], width, h, codes[index], scale[index])
    return codes, scale


def _fit(
    W: Tensor, bits: int, importance: Tensor | None, codes: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the better of the uniform solution given and a codebook, row by row."""
    h = unit_importance(importance, W.abs())
    reach = W.abs() if h is None else W.abs() * (h > 0)
    exponent = exponents(reach.amax(dim=1))
    power = powers_of_two(exponent)
    unit = W.to(torch.float64) / power[:, None]
    if h is not None:  # a weight of no importance must not overflow, nor shape the levels
        limit = torch.ones_like(unit)
        unit = torch.where(h > 0, unit, unit.clamp(-limit, limit))
    rows = SortedRows.of(unit.to(torch.float32), h)
    centers = _lloyd(rows, _starts(rows, scale.to(torch.float64) / power, bits))
    values, fitted_scale = _to_int8(rows, centers)
    fitted_scale = round_scale(fitted_scale * power).clamp(max=max_scale(_TOP))
    values = values.to(torch.float32)
    ratio = W / fitted_scale[:, None]
    cell = torch.searchsorted((values[:, 1:] + values[:, :-1]) / 2, ratio)
    fitted = values.gather(1, cell).to(torch.int8)
    better = _loss(W, fitted, fitted_scale, h) < _loss(W, codes, scale, h)
    return torch.where(better[:, None], fitted, codes), torch.where(better, fitted_scale, scale)


def _loss(W: Tensor, codes: Tensor, scale: Tensor, h: Tensor | None) -> Tensor:
    """Return the weighted squared error of final values, float64 [n]."""
    squared = (W.to(torch.float64) - dequantize(codes, scale).to(torch.float64)).square_()
    return (squared if h is None else squared.mul_(h)).sum(dim=1)


def _starts(rows: SortedRows, scale: Tensor, bits: int) -> Tensor:
    """Return ascending first centers float64 [n, starts, 2^b]."""
    count = 2**bits
    values = rows.values.to(torch.float64)
    mass, total = rows.all()
    mean = (total / mass)[:, None]
    spread = (rows.energy / mass)[:, None].sqrt()
    part = (torch.arange(count, dtype=torch.float64, device=values.device) + 0.5) / count
    if rows.count is None:
        position = (part * values.shape[1]).to(torch.int64).expand(len(values), -1)
    else:
        position = torch.searchsorted(rows.count[:, 1:].contiguous(), mass[:, None] * part)
    quantiles = values.gather(1, position.clamp(max=values.shape[1] - 1))
    side = 2 * part - 1
    grid = uniform_levels(bits).to(values.device, torch.float64)
    doubling = side.sign() * 0.5 ** (count / 2 - (side.abs() * count + 1) / 2)
    starts = [
        scale[:, None] * grid,
        quantiles,
        mean + 1.4 * (quantiles - mean),  # Lloyd-Max levels of a bell reach this much further out
        mean + 3 * spread * side,
        values[:, :1] + (values[:, -1:] - values[:, :1]) * part,
        mean + doubling,  # heavy tails
        _distinct(values, count),
    ]
    if bits == 1:
        starts.append(_best_split(rows))
    return torch.stack(starts, dim=1)


def _best_split(rows: SortedRows) -> Tensor:
    """Return the optimal two centers [n, 2]: the best of all cuts of each sorted row."""
    mass, total = rows.all()
    low_total, low = rows.total, rows.count
    if low is None:
        low = torch.arange(low_total.shape[1], dtype=torch.float64, device=low_total.device)
    high, high_total = mass[:, None] - low, total[:, None] - low_total
    # a cell's error is its energy minus (sum of h w)^2 / (sum of h): maximise what is subtracted
    means = low_total / low.clamp_min(1e-300), high_total / high.clamp_min(1e-300)
    cut = (low_total * means[0] + high_total * means[1]).argmax(dim=1, keepdim=True)
    ends = rows.values.to(torch.float64)[:, [0, -1]]
    centers = torch.cat([mean.gather(1, cut) for mean in means], dim=1)
    return torch.maximum(torch.minimum(centers, ends[:, 1:]), ends[:, :1])


def _distinct(values: Tensor, count: int) -> Tensor:
    """Return the first ``count`` distinct values of ascending rows, the last one repeated."""
    rank = (values.diff(dim=1) > 0).cumsum(dim=1)
    rank = torch.nn.functional.pad(rank, (1, 0))
    index = torch.arange(count, device=values.device).expand(len(values), -1).contiguous()
    position = torch.searchsorted(rank, torch.minimum(index, rank[:, -1:]))
    return values.gather(1, position)


def _lloyd(rows: SortedRows, centers: Tensor) -> Tensor:
    """Improve centers [n, C, L] by Lloyd's iteration; return the `_KEPT` best of each row."""
    for _ in range(_LLOYD_STEPS):
        mass, total = rows.cells(centers)
        moved = torch.where(mass > 0, total / mass.clamp_min(1e-300), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    best = rows.error(centers).topk(min(_KEPT, centers.shape[1]), dim=1, largest=False).indices
    return centers.gather(1, best[:, :, None].expand(-1, -1, centers.shape[2]))


def _to_int8(rows: SortedRows, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Move centers [n, C, L] onto int8 multiples of a scale: (values [n, L], scale float64 [n]).

    Every bfloat16 scale of the octave above ``max|center| / 127`` is tried on the centers, weighted
    by their cells' mass; the best few are polished by Lloyd steps on int8 values.
    """
    largest = centers.abs().amax(dim=2)  # [n, C]
    scale = scales_around(largest / _TOP, -1, 128)  # [n, C, S]
    mass, _ = rows.cells(centers)
    trial = scale[:, :, :, None]
    values = (centers[:, :, None, :] / trial).round_().clamp_(-_TOP, _TOP)
    loss = (mass[:, :, None, :] * (centers[:, :, None, :] - values * trial).square()).sum(dim=3)
    top = loss.topk(_SCALES, dim=2, largest=False).indices
    scale = scale.gather(2, top)
    values = values.gather(2, top[:, :, :, None].expand(*top.shape, centers.shape[2]))
    scale, values = scale.flatten(1), values.flatten(1, 2)  # [n, C S], [n, C S, L]
    error = rows.error(values * scale[:, :, None])
    for _ in range(_POLISH):
        cell_mass, cell_total = rows.cells(values * scale[:, :, None])
        mean = cell_total / cell_mass.clamp_min(1e-300) / scale[:, :, None]
        moved = torch.where(cell_mass > 0, mean.round().clamp(-_TOP, _TOP), values)
        moved_error = rows.error(moved * scale[:, :, None])
        better = moved_error < error
        error = torch.where(better, moved_error, error)
        values = torch.where(better[:, :, None], moved, values)
    best = error.argmin(dim=1, keepdim=True)
    chosen = values.gather(1, best[:, :, None].expand(-1, -1, values.shape[2]))
    return chosen[:, 0], scale.gather(1, best)[:, 0]


def codebook_tables(codes: Tensor, bits: Tensor) -> Tensor:
    """Return the values that each channel uses, ascending.

    Args:
        codes: int8 [O, K].
        bits: int64 [O].

    Returns:
        int8 [O, 2^m], m the largest width <= 4 present ([O, 0] if there is none): a channel's
        distinct codes, the largest repeated to fill the row; zeros for channels wider than 4 bits.

    Raises:
        ConfigError: A channel of b <= 4 bits uses more than 2^b values.
    """
    widths = check_bits(bits, len(codes)).to(codes.device)
    fitted = widths <= CODEBOOK_MAX_BITS
    columns = 2 ** int(widths[fitted].max()) if bool(fitted.any()) else 0
    tables = torch.zeros(len(codes), columns, dtype=torch.int8, device=codes.device)
    if not columns:
        return tables
    present = _present(codes[fitted], widths[fitted])
    rank = present.cumsum(dim=1) - 1
    row, code = present.nonzero(as_tuple=True)
    value = (code - 128).to(torch.int8)
    largest = torch.zeros(len(present), dtype=torch.int8, device=codes.device)
    largest[row[rank[row, code] == rank[row, -1]]] = value[rank[row, code] == rank[row, -1]]
    filled = largest[:, None].repeat(1, columns)
    filled[row, rank[row, code]] = value
    tables[fitted] = filled
    return tables


def code_ranks(codes: Tensor, bits: Tensor) -> Tensor:
    """Return the index of each code in its channel's table.

    Args:
        codes: int8 [O, K].
        bits: int64 [O], all at most 4.

    Returns:
        uint8 [O, K], below 2^bits.

    Raises:
        ConfigError: A channel uses more than 2^bits values.
    """
    rank = (_present(codes, bits).cumsum(dim=1) - 1).to(torch.uint8)
    ranks = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    for part in row_chunks(*codes.shape):
        ranks[part] = rank[part].gather(1, codes[part].to(torch.int64) + 128)
    return ranks


def _present(codes: Tensor, bits: Tensor) -> Tensor:
    """Return which of -128..127 each channel uses: bool [O, 256]."""
    present = torch.zeros(len(codes), 256, dtype=torch.bool, device=codes.device)
    for part in row_chunks(*codes.shape):
        present[part] = present[part].scatter(1, codes[part].to(torch.int64) + 128, True)
    used = present.sum(dim=1)
    excess = (used > 2 ** bits.to(used.device)).nonzero()
    if excess.numel():
        channel = int(excess[0, 0])
        raise ConfigError(
            f"a channel of {int(bits[channel])} bits uses {int(used[channel])} values, more than "
            f"{2 ** int(bits[channel])}; quantize with quantize_codebook at these widths"
        )
    return present
