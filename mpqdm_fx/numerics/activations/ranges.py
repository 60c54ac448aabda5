"""Static activation ranges: per-tensor affine integers in the int8 convention, fitted by MSE.

``code = clamp(round(x / scale) + zero_point, quant_min, quant_max)`` with
``quant_min = -2^(bits-1)``, ``quant_max = 2^(bits-1) - 1``; the value 0 is always exact.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.finite import all_finite
from mpqdm_fx.numerics.levels.grids import MAX_BITS
from mpqdm_fx.numerics.solve.rows import SortedRows, running_sum

__all__ = ["RangeSearch", "affine_qparams", "fake_quantize", "search_range"]

_MIN_SCALE = 2.0**-120  # a float32 whose inverse is one too, far below any activation
_MAX_SCALE = torch.finfo(torch.float32).max
_MAX_SHRINK = 64.0
_FIRST, _TOGETHER = 16, 256  # ranges whose errors are evaluated at once
_ROUNDING = 1e-11  # of the samples' energy: far above what rounding does to sums


def _limits(bits: int) -> tuple[int, int]:
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"activations cannot have {bits} bits; use 1 to {MAX_BITS}")
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def affine_qparams(minimum: float, maximum: float, bits: int) -> tuple[float, int]:
    """Return the scale and zero point that cover a range, extended to contain 0.

    The scale is rounded to float32, which is what every backend stores; all else is float64.

    Args:
        minimum: Lower end; taken as 0 if positive.
        maximum: Upper end; taken as 0 if negative.
        bits: 1 to 8.

    Returns:
        The scale, a finite positive float32 value held in a Python float (at least 2^-120; 1.0 for
        an empty range), and the zero point, a legal code.

    Raises:
        ConfigError: ``bits`` outside 1..8, or ``minimum > maximum``.
        CalibrationError: An end is NaN or infinite.
    """
    _limits(bits)
    if not (math.isfinite(minimum) and math.isfinite(maximum)):
        raise CalibrationError(
            f"activation range {minimum} .. {maximum} is not finite; the calibration data or the "
            "model produce NaN or infinity"
        )
    if minimum > maximum:
        raise ConfigError(f"activation range {minimum} .. {maximum}: the minimum is the larger end")
    ends = torch.tensor([minimum, maximum], dtype=torch.float64)
    scale, zero_point = _qparams(ends[:1], ends[1:], bits)
    return float(scale), int(zero_point)


def _qparams(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (scale, zero_point), both float64 [C], for ranges [C]."""
    quant_min, quant_max = _limits(bits)
    low, high = minimum.clamp_max(0.0), maximum.clamp_min(0.0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(_MIN_SCALE, _MAX_SCALE)
    scale = torch.where(high > low, scale, 1.0).to(torch.float32).to(torch.float64)
    return scale, (quant_min - low / scale).round().clamp(quant_min, quant_max)


def fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """Quantize and dequantize, bit for bit as torch's ``quantized_decomposed`` operators do.

    ``(clamp(round(x * (1 / scale)) + zero_point) - zero_point) * scale`` in float32, rounding half
    to even. No straight-through gradient: the derivative of rounding is 0.

    Args:
        x: Any shape and float dtype (taken as float32), not NaN.
        scale: Positive step size.
        zero_point: Code of 0.
        bits: 1 to 8.

    Returns:
        float32, shape of x.

    Raises:
        ConfigError: ``bits`` outside 1..8.
    """
    quant_min, quant_max = _limits(bits)
    codes = torch.round(x.to(torch.float32) * (1.0 / scale)) + zero_point
    return (codes.clamp(quant_min, quant_max) - zero_point) * scale


def search_range(
    samples: Tensor, minimum: float, maximum: float, bits: int, *, steps: int = 24
) -> tuple[float, int]:
    """Return the range of least squared error on samples: clipped outliers for a finer step.

    Both ends shrink independently, ``steps`` geometric ratios down to 1/64 each, then ``steps``
    ratios around the best pair. The error of a pair is exact (sums over the sorted samples); pairs
    that clip away more than the best pair's whole error are not evaluated.

    Args:
        samples: Values the tensor took, any shape, float; a random subset is enough.
        minimum: Smallest value seen, possibly outside ``samples``.
        maximum: Largest value seen.
        bits: 1 to 8.
        steps: Candidates for each end in each stage, at least 2.

    Returns:
        Scale and zero point as `affine_qparams` gives them; never worse on ``samples`` than
        ``affine_qparams(minimum, maximum, bits)``.

    Raises:
        ConfigError: ``bits`` or ``steps`` out of range, or ``minimum > maximum``.
        CalibrationError: The samples or ends hold NaN or infinity.
    """
    return RangeSearch(samples, minimum, maximum).best(bits, steps=steps)


class RangeSearch:
    """`search_range` on one sample for any width: the sample is sorted once.

    Args:
        samples: As there.
        minimum: As there.
        maximum: As there.

    Raises:
        ConfigError: ``minimum > maximum``.
        CalibrationError: The samples or ends hold NaN or infinity.
    """

    def __init__(self, samples: Tensor, minimum: float, maximum: float) -> None:
        self._ends = minimum, maximum
        affine_qparams(minimum, maximum, MAX_BITS)  # refuses ends that are none
        self._values = samples.detach().flatten().to(torch.float32)
        if not all_finite(self._values):
            raise CalibrationError("activation samples hold NaN or infinity")
        self._low, self._high = min(minimum, 0.0), max(maximum, 0.0)
        self._unit = max(self._high, -self._low)  # sums hold squares of what may be any float32

    @cached_property
    def _sample(self) -> "_Samples":
        return _Samples.of((self._values.to(torch.float64) / self._unit).to(torch.float32))

    def best(self, bits: int, *, steps: int = 24) -> tuple[float, int]:
        """Scale and zero point; see `search_range`.

        Args:
            bits: 1 to 8.
            steps: Candidates for each end in each stage, at least 2.

        Raises:
            ConfigError: ``bits`` or ``steps`` out of range.
        """
        whole = affine_qparams(*self._ends, bits)
        if steps < 2:
            raise ConfigError(f"a range search needs at least 2 steps, got {steps}")
        low, high, values = self._low, self._high, self._values
        if not len(values) or low == high:
            return whole
        sample, ends = self._sample, (low / self._unit, high / self._unit)
        ratio = _MAX_SHRINK ** -torch.linspace(0, 1, steps, dtype=torch.float64)
        best = _best_shrink(sample, *ends, ratio, ratio, bits)
        step = _MAX_SHRINK ** (1 / (steps - 1))
        fine = step ** torch.linspace(-1, 1, steps, dtype=torch.float64)
        lower, upper = ((fine * shrink).clamp_max(1.0) for shrink in best)
        best = _best_shrink(sample, *ends, lower, upper, bits)
        clipped = affine_qparams(low * best[0], high * best[1], bits)
        return clipped if _loss(values, clipped, bits) < _loss(values, whole, bits) else whole


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Sorted values and sums over the first 0, 1, ..., K of them.

    Attributes:
        values: float32 [K], ascending.
        total: Their sums, float64 [K + 1].
        squares: Sums of their squares, float64 [K + 1].
    """

    values: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Self:
        rows = SortedRows.of(values[None], None)
        squares = running_sum(rows.values.to(torch.float64).square())
        return cls(values=rows.values[0], total=rows.total[0], squares=squares[0])

    def clipped(self, lowest: Tensor, highest: Tensor) -> Tensor:
        """What values outside of ranges lose, float64 [C]: at most the ranges' errors.

        Args:
            lowest: The smallest level of each range, float64 [C].
            highest: The largest.
        """
        below = torch.searchsorted(self.values, lowest.to(torch.float32))
        inside = torch.searchsorted(self.values, highest.to(torch.float32))
        total, squares = (
            self.total[-1] - self.total[inside],
            self.squares[-1] - self.squares[inside],
        )
        low = self.squares[below] - lowest * (2 * self.total[below] - lowest * below)
        return low + squares - highest * (2 * total - highest * (len(self.values) - inside))

    def error(self, first: Tensor, step: Tensor, count: int) -> Tensor:
        """Squared error of rounding to the nearest level, float64 [C].

        To about 1e-13 of the values' energy, since it is a difference of sums.

        Args:
            first: The smallest level of each range, float64 [C].
            step: Distance of its levels, float64 [C].
            count: Number of levels.
        """
        # [L - 1, C]: ranges differ little, and looking up what is near is several times as fast
        middle = first + (torch.arange(count - 1, dtype=torch.float64)[:, None] + 0.5) * step
        below = torch.searchsorted(self.values, middle.to(torch.float32))
        gained = (middle * below).sub_(self.total[below]).sum(dim=0)
        last = first + (count - 1) * step
        whole = last * (last * len(self.values) - 2 * self.total[-1])
        return self.squares[-1] + whole - 2 * step * gained


def _best_shrink(
    sample: _Samples, low: float, high: float, lower: Tensor, upper: Tensor, bits: int
) -> tuple[float, float]:
    """Return the pair of ratios, one of ``lower`` and one of ``upper``, of least error."""
    lower = torch.unique_consecutive(lower) if low < 0 else lower[:1]
    upper = torch.unique_consecutive(upper) if high > 0 else upper[:1]
    pairs = torch.cartesian_prod(lower, upper)
    scale, zero_point = _qparams(low * pairs[:, 0], high * pairs[:, 1], bits)
    quant_min, quant_max = _limits(bits)
    first, last = (quant_min - zero_point) * scale, (quant_max - zero_point) * scale
    bound = sample.clipped(first, last)
    # Likely ones first: with a good one known, few of the others can be better.
    likely = bound + len(sample.values) * scale.square() / 12
    error = torch.full_like(bound, math.inf)
    slack = _ROUNDING * float(sample.squares[-1])
    waiting, together = likely.argsort(stable=True), _FIRST
    while len(waiting):
        now, waiting, together = waiting[:together].sort().values, waiting[together:], _TOGETHER
        error[now] = sample.error(first[now], scale[now], quant_max - quant_min + 1)
        waiting = waiting[bound[waiting] <= error.min() + slack]
    best = pairs[int(error.argmin())]
    return float(best[0]), float(best[1])


def _loss(values: Tensor, qparams: tuple[float, int], bits: int) -> float:
    difference = values.to(torch.float64) - fake_quantize(values, *qparams, bits)
    return float(difference.square().sum())
