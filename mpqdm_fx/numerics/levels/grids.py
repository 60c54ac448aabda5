"""Uniform level sets inside int8: 2^b levels a channel, each an int8 value times a scale.

Levels are balanced, zero_point is 0: 1 bit {-1, 1}, 2 bits {-3, -1, 1, 3}, up to 7 bits; at 8 bits
they are -127..127. Balanced levels repair the 1-bit channels of MPQ-DM's affine grid, which have
no sign (BitsFusion, arXiv 2406.04333, measured the same defect), and run as plain symmetric int8.
"""

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.solve.rows import exponents, powers_of_two

__all__ = [
    "CODEBOOK_MAX_BITS",
    "MAX_BITS",
    "MIN_SCALE",
    "check_bits",
    "dequantize",
    "max_scale",
    "round_scale",
    "scales_around",
    "snap",
    "snap_ratio",
    "top_level",
    "uniform_levels",
]

MAX_BITS = 8
CODEBOOK_MAX_BITS = 4
MIN_SCALE = 2.0**-126
"""The smallest normal bfloat16: the scale of an all-zero row."""

_FLOAT_MAX = torch.finfo(torch.float32).max
_BFLOAT16_MAX = torch.finfo(torch.bfloat16).max


def check_bits(bits: Tensor, channels: int) -> Tensor:
    """Return ``bits`` as int64 [channels], or say what is wrong with them.

    Raises:
        ConfigError: Wrong shape, or a width outside 1..8.
    """
    if bits.shape != (channels,) or bits.is_floating_point():
        raise ConfigError(
            f"bits must be integers of shape ({channels},), one width per output channel, "
            f"got {bits.dtype} {tuple(bits.shape)}"
        )
    widths = bits.detach().to("cpu", torch.int64)
    wrong = widths[(widths < 1) | (widths > MAX_BITS)]
    if wrong.numel():
        raise ConfigError(f"a channel cannot have {int(wrong[0])} bits; use 1 to {MAX_BITS}")
    return widths


def uniform_levels(bits: int) -> Tensor:
    """Return the level set of ``bits`` bits, ascending.

    Args:
        bits: 1 to 8.

    Returns:
        int8 [2^bits]: odd integers ``-(2^b - 1) .. 2^b - 1`` for b <= 7; int8 [255], all integers
        -127..127, for 8 bits.

    Raises:
        ConfigError: ``bits`` outside 1..8.
    """
    top = top_level(bits)
    return torch.arange(-top, top + 1, 1 if bits == MAX_BITS else 2, dtype=torch.int8)


def top_level(bits: int) -> int:
    """The largest level of `bits` bits."""
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"a channel cannot have {bits} bits; use 1 to {MAX_BITS}")
    return 127 if bits == MAX_BITS else 2**bits - 1


def round_scale(scale: Tensor) -> Tensor:
    """Round scales to the nearest positive normal bfloat16 value, kept as float32.

    Sixteen stored bits a scale with float32's range; an int8 code times such a scale is exact in
    float32 (at most 15 significant bits).

    Args:
        scale: Any float dtype and shape, not NaN.

    Returns:
        float32 of the same shape, each in ``MIN_SCALE .. max(bfloat16)``.
    """
    rounded = scale.to(torch.float32).to(torch.bfloat16).to(torch.float32)
    return rounded.clamp(MIN_SCALE, _BFLOAT16_MAX)


def scales_around(scale: Tensor, first: int, last: int) -> Tensor:
    """Return the bfloat16 scales next to each scale.

    Args:
        scale: Positive, any shape and float dtype.
        first: Place of the first neighbour: 0 is the nearest bfloat16 value, -1 the one below.
        last: Place of the last neighbour; 128 places are a factor of two.

    Returns:
        float64 [..., last - first + 1], ascending, none below ``MIN_SCALE``.
    """
    pattern = round_scale(scale).to(torch.bfloat16).view(torch.int16).to(torch.int32)
    places = torch.arange(first, last + 1, dtype=torch.int32, device=scale.device)
    pattern = (pattern[..., None] + places).clamp(0x0080, 0x7F7F).to(torch.int16)
    return pattern.view(torch.bfloat16).to(torch.float64)


def max_scale(top: int) -> float:
    """Return the largest bfloat16 scale whose level ``top`` is still a finite float32."""
    limit = torch.tensor(_FLOAT_MAX / top, dtype=torch.float64)
    unit = powers_of_two(exponents(limit) - 8)  # one unit in the last place of a bfloat16
    return float(torch.floor(limit / unit) * unit)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of codes: ``codes * scale``, exact for bfloat16 scales.

    Args:
        codes: int8 [O, ...], one output channel per row.
        scale: float32 [O].

    Returns:
        float32 of the codes' shape.

    Raises:
        ConfigError: Not one scale per row of codes.
    """
    if scale.shape != codes.shape[:1]:
        raise ConfigError(
            f"dequantize: {codes.shape[0]} rows of codes need as many scales, "
            f"got shape {tuple(scale.shape)}"
        )
    return codes.to(torch.float32) * scale.to(torch.float32).view(-1, *[1] * (codes.ndim - 1))


def snap(W: Tensor, scale: Tensor, bits: int | Tensor) -> Tensor:
    """Return the nearest legal codes of weights for given scales.

    ``|w - code * scale| <= scale`` (half a level spacing, ``scale / 2`` at 8 bits) inside the
    range, to one unit in the last place of ``w / scale``; outside it the outermost level. A weight
    exactly between two balanced levels takes the upper one.

    Args:
        W: Finite weight rows [O, K], taken as float32.
        scale: float32 [O], positive.
        bits: One width, or int64 [O].

    Returns:
        int8 codes [O, K].

    Raises:
        ConfigError: ``bits`` outside 1..8 or of the wrong shape.
    """
    widths = torch.full((len(W),), bits) if isinstance(bits, int) else bits
    widths = check_bits(widths, len(W))
    ratio = W.detach().to(torch.float32) / scale.to(torch.float32)[:, None]
    present = sorted(set(widths.tolist()))
    if len(present) == 1:
        return snap_ratio(ratio, present[0])
    codes = torch.empty(ratio.shape, dtype=torch.int8, device=ratio.device)
    for width in present:
        rows = (widths == width).nonzero()[:, 0].to(ratio.device)
        codes[rows] = snap_ratio(ratio[rows], width)
    return codes


def snap_ratio(ratio: Tensor, bits: int) -> Tensor:
    """Nearest levels, int8, of weights over their scale, all of one width."""
    top = top_level(bits)
    if bits == MAX_BITS:
        return ratio.round().clamp_(-top, top).to(torch.int8)
    return ratio.mul(0.5).floor_().mul_(2.0).add_(1.0).clamp_(-top, top).to(torch.int8)
