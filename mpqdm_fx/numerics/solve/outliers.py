"""Which channels hold outliers: smoothing factors and kurtosis (MPQ-DM, arXiv 2412.11549)."""

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError

__all__ = ["kurtosis", "power_of_two", "smoothing_factors"]

_MIN_PEAK = 1e-5
_FACTOR_RANGE = (1e-2, 1e2)


def kurtosis(rows: Tensor) -> Tensor:
    """Return the kurtosis of each row, ``mean((w - mean)^4) / std^4`` with the unbiased std.

    Not excess kurtosis: about 3 for a Gaussian row, more with outliers. Invariant to
    ``a w + b``, ``a != 0``; equivariant to permutations of the rows.

    Args:
        rows: [O, K], any float dtype, finite.

    Returns:
        float64 [O]; 0 for a row without variance (constant, or of one element): nothing to promote.

    Raises:
        ConfigError: ``rows`` is not a matrix.
    """
    if rows.ndim != 2:
        raise ConfigError(f"kurtosis needs rows [channels, K], got shape {tuple(rows.shape)}")
    values = rows.detach().to(torch.float64)
    if values.shape[1] < 2:
        return values.new_zeros(len(values))
    # Relative to the first element a constant row is exactly zero, which the mean's rounding would
    # hide; relative to the peak no fourth power leaves the exponents.
    shifted = values - values[:, :1]
    peak = shifted.abs().amax(dim=1, keepdim=True)
    varies = peak > 0
    unit = shifted / torch.where(varies, peak, 1.0)
    centered = unit - unit.mean(dim=1, keepdim=True)
    variance = centered.square().sum(dim=1) / (values.shape[1] - 1)
    # squared twice: torch's pow rounds differently at the end of a vector, row by row
    fourth = centered.square().square().mean(dim=1)
    varies = varies[:, 0]
    return torch.where(varies, fourth / torch.where(varies, variance, 1.0).square(), 0.0)


def smoothing_factors(activation_max: Tensor, weight_max: Tensor) -> Tensor:
    """Return per-input-channel factors: weights are multiplied, activations divided by them.

    ``factor_i = sqrt(max|X_i| / max|W_i|)``, so both get the same peak
    ``sqrt(max|X_i| max|W_i|)``: the released pre-scaling of MPQ-DM (the paper writes its inverse,
    delta), SmoothQuant (arXiv 2211.10438, equation 4) at strength 0.5.

    Args:
        activation_max: Largest magnitude of each input channel, [C], nonnegative.
        weight_max: Largest magnitude of the weights on each input channel, [C], nonnegative.

    Returns:
        float64 [C]. Peaks are clamped to at least 1e-5 and factors to 0.01 .. 100, since dead
        channels would give 0, infinity or NaN.

    Raises:
        ConfigError: The shapes differ.
    """
    if activation_max.shape != weight_max.shape:
        raise ConfigError(
            f"smoothing: {tuple(activation_max.shape)} activation peaks but "
            f"{tuple(weight_max.shape)} weight peaks; both are per input channel"
        )
    peak_x = activation_max.detach().to(torch.float64).clamp_min(_MIN_PEAK)
    peak_w = weight_max.detach().to(torch.float64).clamp_min(_MIN_PEAK)
    return (peak_x / peak_w).sqrt().clamp(*_FACTOR_RANGE)


def power_of_two(values: Tensor) -> Tensor:
    """The power of two next to each positive value on a logarithmic scale, float32."""
    return torch.exp2(values.double().log2().round()).float()
