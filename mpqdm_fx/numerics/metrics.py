"""Signal-to-quantization-noise ratio, the one number by which tensors are compared."""

import math

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError

__all__ = ["float64_parts", "power_sums", "ratio_db", "sqnr_db"]


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Compare two tensors by their signal-to-quantization-noise ratio, in decibels.

    ``10 log10(sum reference^2 / sum (reference - test)^2)``, both sums in float64.

    Args:
        reference: The float tensor, any shape and dtype.
        test: The tensor that should equal it, same shape.

    Returns:
        Decibels; ``inf`` when the tensors are identical (also when both are empty or zero),
        ``-inf`` when the reference is zero and the test is not, ``nan`` when either holds a NaN.

    Raises:
        ConfigError: The shapes differ.
    """
    if reference.shape != test.shape:
        raise ConfigError(
            f"sqnr_db: reference has shape {tuple(reference.shape)} but test has "
            f"{tuple(test.shape)}; compare tensors of one shape"
        )
    return ratio_db(*power_sums(reference, test))


def power_sums(reference: Tensor, test: Tensor) -> tuple[float, float]:
    """Sums of squares of a tensor and of another one's difference from it, in float64.

    Args:
        reference: Any shape and dtype; of complex numbers both parts count.
        test: The same shape.

    Returns:
        ``sum reference^2`` and ``sum (reference - test)^2``; sums of parts add up to those of the
        whole.
    """
    signal = float64_parts(reference)
    noise = signal - float64_parts(test)
    return float(signal.square().sum()), float(noise.square().sum())


def ratio_db(signal_power: float, noise_power: float) -> float:
    """Ratio of two sums of `power_sums` in decibels; `inf`, `-inf` and `nan` as of `sqnr_db`."""
    if noise_power == 0.0:
        return math.inf
    if signal_power == 0.0:
        return math.nan if math.isnan(noise_power) else -math.inf
    return 10.0 * (math.log10(signal_power) - math.log10(noise_power))


def float64_parts(tensor: Tensor) -> Tensor:
    """A tensor's numbers as they are compared.

    Args:
        tensor: Any shape and dtype.

    Returns:
        float64, the same shape; of complex numbers [..., 2], both parts along a last axis.
    """
    tensor = tensor.detach()
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.to(torch.float64)
