"""Even levels at the integers that fit four bits: -8..7 times a scale, zero point 0.

The balanced levels of a 4-bit channel are the odd integers -15..15, which take five bits as a
two's complement integer. Kernels that store four bits a weight (XNNPACK's) have -8..7 instead: as
many levels, one of them 0, one more below it than above.
"""

import torch
from torch import Tensor

from mpqdm_fx.numerics.levels.grids import check_bits, max_scale, round_scale, scales_around
from mpqdm_fx.numerics.solve.rows import (
    check_importance,
    check_weight,
    exponents,
    importance_of,
    powers_of_two,
    row_chunks,
    unit_importance,
)
from mpqdm_fx.numerics.solve.scales import quantize_uniform

__all__ = ["INT4_BITS", "int4_levels", "nearest_int4", "quantize_int4", "snap_int4"]

INT4_BITS = 4
_LOWEST, _HIGHEST = -8, 7
_SCALES = 32  # of the coarse search
_KEPT = 3  # best of them that are refitted
_REFITS = 3
_REACH = 2  # bfloat16 neighbours of a refitted scale, on either side


def int4_levels() -> Tensor:
    """The integers -8..7, int8 [16]."""
    return torch.arange(_LOWEST, _HIGHEST + 1, dtype=torch.int8)


def snap_int4(ratio: Tensor) -> Tensor:
    """The nearest of the integers -8..7, in the dtype of `ratio` (weights over their scale)."""
    return ratio.round().clamp(_LOWEST, _HIGHEST)


def nearest_int4(W: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of -8..7 at the scale at which 7 is each row's largest weight.

    Args:
        W: Weight rows [n, K], float32.

    Returns:
        Codes, whole numbers in float32 [n, K], and scale float32 [n] (bfloat16 values).
    """
    largest = W.abs().amax(dim=1)
    scale = round_scale(torch.where(largest > 0, largest / _HIGHEST, torch.ones_like(largest)))
    return snap_int4(W / scale[:, None]), scale


def quantize_int4(
    W: Tensor, bits: Tensor, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize weight rows; those of four bits onto -8..7, others as `quantize_uniform` does.

    Scales of 4-bit rows minimise ``sum_k h_k (w_k - s q_k)^2`` over a geometric grid, least-squares
    refits and the bfloat16 values around them. A row that lies on such a grid comes back with
    error 0; a power of two scales the scale and leaves the codes; rows do not influence each other.

    Args:
        W: Weight rows [O, K], any float dtype (taken as float32), finite.
        bits: int64 [O], 1 to 8 each.
        importance: Error weights h >= 0, [K] or [O, K]; None for equal ones.

    Returns:
        codes int8 [O, K] and scale float32 [O] (bfloat16 values).

    Raises:
        ConfigError: Shapes or widths are wrong.
        CalibrationError: Weights or importance are not finite, or importance is negative.
    """
    rows = check_weight(W)
    codes, scale = quantize_uniform(rows, bits, importance)
    if importance is not None:
        importance = check_importance(importance, rows.shape)
    members = (check_bits(bits, len(rows)) == INT4_BITS).nonzero()[:, 0].to(rows.device)
    for part in row_chunks(len(members), rows.shape[1] * (_SCALES + 8)):
        index = members[part]
        h = importance_of(importance, index)
        scale[index] = _fit_scale(rows[index], h)
        codes[index] = snap_int4(rows[index] / scale[index][:, None]).to(torch.int8)
    return codes, scale


def _fit_scale(W: Tensor, importance: Tensor | None) -> Tensor:
    """The best scale float32 [n] for rows [n, K]."""
    h = unit_importance(importance, W.abs())
    h = torch.ones_like(W) if h is None else h
    counted = torch.where(h > 0, W, 0.0)
    maximum = counted.abs().amax(dim=1)
    power = powers_of_two(exponents(maximum))
    unit = (counted.to(torch.float64) / power[:, None]).to(torch.float32)
    top = unit.abs().amax(dim=1).to(torch.float64)
    # As for balanced levels: a least-squares scale is at least (weighted mean magnitude) / 8.
    mean = (h * unit.abs()).sum(dim=1).to(torch.float64) / h.sum(dim=1).to(torch.float64)
    low = torch.minimum(mean / 8, top / 8).clamp_min(1e-30)
    high = (top / 4).clamp_min(1e-30)
    step = torch.arange(_SCALES + 1, dtype=torch.float64, device=W.device) / _SCALES
    scale = low[:, None] * (high / low)[:, None] ** step
    error, refit = _errors(unit, h, scale)
    scale = refit.gather(1, error.topk(_KEPT, dim=1, largest=False).indices)
    for _ in range(_REFITS - 1):
        _, scale = _errors(unit, h, scale)
    exact = top[:, None] / torch.arange(1, 9, dtype=torch.float64, device=W.device)
    around = torch.cat([scales_around(scale, -_REACH, _REACH).flatten(1), _stored(exact)], dim=1)
    error, _ = _errors(unit, h, around)
    best = around.gather(1, error.argmin(dim=1, keepdim=True))[:, 0]
    best = torch.where(top > 0, best * power, 0.0)
    return round_scale(best).clamp(max=max_scale(-_LOWEST))


def _stored(scale: Tensor) -> Tensor:
    return round_scale(scale).to(torch.float64)


def _errors(unit: Tensor, h: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(Squared error, least-squares refit) float64 [n, C] of scales."""
    row = unit[:, None, :]
    step = scale.to(torch.float32)[:, :, None]
    q = snap_int4(row / step)
    weights = h[:, None, :]
    error = (weights * (row - step * q).square()).sum(dim=2).to(torch.float64)
    power = (weights * q.square()).sum(dim=2).to(torch.float64)
    cross = (weights * row * q).sum(dim=2).to(torch.float64)
    positive = (power > 0) & (cross > 0)
    return error, torch.where(positive, cross / power.clamp_min(1e-300), scale)
