"""What the operators on known ranges compute, in torch: the steps of FORMAT.md in their order."""

import torch
from torch import Tensor

from mpqdm_fx.backends.lowbit.reference import check_dtype, group_norm_mixed
from mpqdm_fx.errors import ConfigError

__all__ = [
    "check_range",
    "dequantize_mixed",
    "group_norm_quantize_static_mixed",
    "quantize_static_mixed",
]

_LOWEST, _HIGHEST = -128, 127


def quantize_static_mixed(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize a tensor on one known range, as `quantized_decomposed.quantize_per_tensor` does.

    Args:
        x: float32, any shape.
        scale: float32 [1], positive, finite, not denormal.
        zero_point: int32 [1], -128 to 127.

    Returns:
        int8 in x's shape: ``round(x / scale) + zero_point`` within -128..127, ties to the even
        number. Unlike a range chosen at run time it cannot tell of NaN: NaN has the code -128.

    Raises:
        ConfigError: A dtype, a shape or a number is wrong.
    """
    check_dtype("x", x, torch.float32)
    step, zero = _numbers(scale, zero_point)
    steps = x * (1.0 / step)
    least = torch.tensor(float(_LOWEST - zero))
    bounded = torch.where(steps > least, steps, least).clamp(max=_HIGHEST - zero)
    return (bounded.round() + zero).to(torch.int8)


def dequantize_mixed(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The numbers that codes of one known range stand for.

    Args:
        codes: int8, any shape.
        scale: As of `quantize_static_mixed`; so is `zero_point`.
        zero_point: int32 [1].

    Returns:
        float32 in the shape of the codes: ``scale * (code - zero_point)``.

    Raises:
        ConfigError: A dtype, a shape or a number is wrong.
    """
    check_dtype("codes", codes, torch.int8)
    step, zero = _numbers(scale, zero_point)
    return (codes.to(torch.float32) - zero) * step


def group_norm_quantize_static_mixed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    factor: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor,
    zero_point: Tensor,
) -> Tensor:
    """`group_norm_mixed`, then `quantize_static_mixed`.

    Args and errors are those of the two; the result is that of the second, int8 [B, H, W, C].
    """
    normal = group_norm_mixed(x, weight, bias, factor, groups, eps, silu)
    return quantize_static_mixed(normal, scale, zero_point)


def check_range(scale: Tensor, zero_point: Tensor) -> None:
    """Refuse scales and zero points of other dtypes or shapes; no number is read.

    Raises:
        ConfigError: Says what is expected.
    """
    check_dtype("scale", scale, torch.float32)
    check_dtype("zero_point", zero_point, torch.int32)
    if scale.shape != (1,) or zero_point.shape != (1,):
        raise ConfigError(
            f"scale and zero_point: one number each expected, got {list(scale.shape)} and "
            f"{list(zero_point.shape)}"
        )


def _numbers(scale: Tensor, zero_point: Tensor) -> tuple[float, int]:
    check_range(scale, zero_point)
    step, zero = float(scale), int(zero_point)
    limits = torch.finfo(torch.float32)
    if not limits.smallest_normal <= step <= limits.max:
        raise ConfigError(f"scale: {step} is not a positive normal number")
    if not _LOWEST <= zero <= _HIGHEST:
        raise ConfigError(f"zero_point: {zero} is outside {_LOWEST}..{_HIGHEST}")
    return step, zero
