"""Activation ranges computed at run time, to the formula of XNNPACK's qd8 kernels.

The formula is that of `xnn_f32_qd8_asymmetric_quantization_params` (XNNPACK, the file
src/xnnpack/quantization.h), in float32 throughout: the range is extended to contain 0, the step
fills all codes, and the zero point is taken from the end of the range that it fits better, then
rounded to an integer. The kernels multiply by the inverse step and round half to even.
"""

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.levels.grids import MAX_BITS

__all__ = ["dynamic_qparams", "fake_quantize_dynamic"]


def dynamic_qparams(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the inverse step and the zero point of ranges.

    Args:
        minimum: Smallest value of each range, float32, any shape.
        maximum: Largest value, likewise.
        bits: 1 to 8; codes run from `-2^(bits-1)` to `2^(bits-1) - 1`. XNNPACK has 8 only.

    Returns:
        Inverse step (codes per unit; 1 for an empty range) and zero point (a whole number), both
        float32 in the shape of the ranges.

    Raises:
        ConfigError: `bits` is outside 1..8.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"activations cannot have {bits} bits; use 1 to {MAX_BITS}")
    quant_min, quant_max = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    low, high = minimum.clamp_max(0.0), maximum.clamp_min(0.0)
    width = high - low
    # a number over a tensor would be its reciprocal times the number: rounded twice
    inverse = torch.full_like(width, quant_max - quant_min) / width
    # An empty range would divide by zero, and one of a few denormal numbers overflows.
    inverse = torch.where(torch.isinf(inverse), torch.ones_like(inverse), inverse)
    low, high = low * inverse, high * inverse
    from_low = (quant_min + low) + (quant_max + high) > 0
    zero_point = torch.where(from_low, quant_min - low, quant_max - high)
    return inverse, zero_point.clamp(quant_min, quant_max).round()


def fake_quantize_dynamic(x: Tensor, bits: int, axes: int | tuple[int, ...]) -> Tensor:
    """Quantize and dequantize with a range of its own for every slice along some axes.

    Args:
        x: Any float dtype (computed in float32), with at least these axes.
        bits: 1 to 8.
        axes: The axes along which values share one range, or the number of trailing ones: 1 for the
            rows of a linear layer, 1 + spatial axes for the samples of a convolution, (-3,) for
            the pixels of [..., C, H, W].

    Returns:
        Shape and dtype of x.

    Raises:
        ConfigError: `bits` is outside 1..8.
    """
    values = x.to(torch.float32)
    shared = tuple(range(-axes, 0)) if isinstance(axes, int) else axes
    minimum, maximum = values.amin(shared, keepdim=True), values.amax(shared, keepdim=True)
    inverse, zero_point = dynamic_qparams(minimum, maximum, bits)
    # The kernels clamp to these bounds less the zero point, then round. Zero points are whole, and
    # so are steps of at most 2^8 once they are rounded: sums are exact and the order is the same,
    # while bounds that are the same for all values are clamped to several times faster.
    quant_min, quant_max = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    codes = (values * inverse).round_().add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(inverse.reciprocal()).to(x.dtype)
