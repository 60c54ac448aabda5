"""Signal-to-quantization-noise ratio, the one number by which tensors are compared."""

import math

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError

__all__ = ["sqnr_db"]


def sqnr_db(reference: Tensor, test: Tensor) -> float:
    """Compare two tensors by their signal-to-quantization-noise ratio, in decibels.

    ``10 log10(sum reference^2 / sum (reference - test)^2)``, both sums in float64.

    Args:
        reference: The float tensor, any shape and real dtype.
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
    signal = reference.detach().to(torch.float64)
    noise_power = float((signal - test.detach().to(torch.float64)).square().sum())
    if noise_power == 0.0:
        return math.inf
    signal_power = float(signal.square().sum())
    if signal_power == 0.0:
        return math.nan if math.isnan(noise_power) else -math.inf
    return 10.0 * (math.log10(signal_power) - math.log10(noise_power))
