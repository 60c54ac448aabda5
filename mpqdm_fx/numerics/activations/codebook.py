"""Fitted levels of activations: 2^b int8 values for one tensor, and rounding to them.

A kernel that multiplies int8 numbers takes them as they are: what is stored or sent between layers
is the place of a level, of b bits, and the level itself has eight. Activations are far from evenly
spread (most are near 0, a few reach far), which costs evenly spaced levels 1 to 4 dB at four bits.
"""

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.activations.ranges import fake_quantize
from mpqdm_fx.numerics.levels.codebook import quantize_codebook
from mpqdm_fx.numerics.levels.grids import CODEBOOK_MAX_BITS

__all__ = ["fake_quantize_levels", "fit_levels"]

_TOP = 127  # the largest level


def fit_levels(
    samples: Tensor, scale: float, zero_point: int, bits: int
) -> tuple[float, tuple[int, ...]]:
    """Fit at most 2^b int8 levels to samples, by Lloyd's iteration.

    Args:
        samples: Values that the tensor took, any shape, float, finite; at least one.
        scale: Step of evenly spaced codes for the same tensor, to start from and to beat.
        zero_point: Their code of 0.
        bits: Width of the codes, 1 to 4.

    Returns:
        Step, a float32 number, and ascending levels within -127..127. Their squared error on the
        samples is never above that of the evenly spaced codes.

    Raises:
        ConfigError: `bits` is outside 1..4.
        CalibrationError: The samples hold NaN or infinity.
    """
    if not 1 <= bits <= CODEBOOK_MAX_BITS:
        raise ConfigError(f"fitted levels have 1 to {CODEBOOK_MAX_BITS} bits, not {bits}")
    row = samples.detach().float().reshape(1, -1)
    even = tuple(range(-(1 << (bits - 1)) - zero_point, (1 << (bits - 1)) - zero_point))
    codes, fitted = quantize_codebook(row, torch.tensor([bits]))
    levels, step = torch.unique(codes), float(fitted)
    error = _error(row, fake_quantize_levels(row, fitted, levels.float()[None]))
    if error > _error(row, fake_quantize(row, scale, zero_point, bits)):
        return scale, even
    return step, tuple(levels.tolist())


def fake_quantize_levels(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Round to the nearest of a table's levels: of one table, or of a table for each row.

    Args:
        x: Float [R, ...], computed in float32; any shape where there is one table.
        scale: Step, float32 [1] or [R].
        levels: float32 [1, L] or [R, L], whole numbers within -127..127, ascending; a level may be
            repeated. Halfway between two levels the upper one is taken.

    Returns:
        float32, shape of x.
    """
    flat = x.to(torch.float32).reshape(len(levels), -1)
    # Levels are whole numbers, so they meet at multiples of a half: which half steps a value lies
    # between tells its level. Looking that up takes a twentieth of a search among the levels.
    halves = torch.arange(-2 * _TOP, 2 * _TOP + 1, dtype=torch.float32, device=flat.device) / 2
    between = (levels[:, 1:] + levels[:, :-1]) / 2
    places = torch.searchsorted(between, halves.expand(len(levels), -1).contiguous(), right=True)
    table = levels.gather(1, places) * scale[:, None]
    # NaN takes the largest level, as infinity does
    steps = (flat / scale[:, None]).mul_(2).nan_to_num_(nan=2.0 * _TOP).floor_()
    index = steps.clamp_(-2 * _TOP, 2 * _TOP).add_(2 * _TOP).to(torch.int32)
    if len(levels) > 1:
        index += len(halves) * torch.arange(len(levels), device=flat.device)[:, None].to(index)
    return table.flatten().index_select(0, index.flatten()).reshape(x.shape)


def _error(samples: Tensor, rounded: Tensor) -> float:
    return float((samples.double() - rounded.double()).square().sum())
