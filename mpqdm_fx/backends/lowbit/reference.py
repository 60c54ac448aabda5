"""What the operators compute, in torch: exact integers, float steps in the order of FORMAT.md.

Sums of products of codes stay below 2^31. They are taken by float32 products of pieces that are
exact in any order (`numerics.exact_products`).
"""

import functools
import math

import torch
from torch import Tensor

from mpqdm_fx.backends.lowbit.blob import BlobContent, unpack_blob
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.activations.dynamic import dynamic_qparams
from mpqdm_fx.numerics.exact_products import exact_convolution, exact_product

__all__ = [
    "check_dtype",
    "check_group_norm",
    "conv2d_mixed",
    "conv2d_shape",
    "group_norm_mixed",
    "group_norm_quantize_mixed",
    "linear_mixed",
    "linear_shape",
    "quantize_mixed",
]

_CACHED_BLOBS = 16


def quantize_mixed(x: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize equal parts of a tensor, each on its own range.

    Args:
        x: float32, at least one number, cut into `parts` equal runs of its elements.
        parts: 1 or more.

    Returns:
        int8 codes in x's shape, float32 scale [parts], int32 zero point [parts]; a number is about
        ``scale * (code - zero_point)``. A part with NaN or infinity has the scale NaN, the zero
        point 0 and all codes 0.

    Raises:
        ConfigError: x is not float32, or cannot be cut so.
    """
    check_dtype("x", x, torch.float32)
    if parts < 1 or not x.numel() or x.numel() % parts:
        raise ConfigError(f"quantize_mixed: {list(x.shape)} cannot be cut into {parts} equal parts")
    runs = x.reshape(parts, -1)
    minimum, maximum = runs.amin(1), runs.amax(1)
    inverse, zero_point = dynamic_qparams(minimum, maximum, 8)
    finite = minimum.isfinite() & maximum.isfinite()
    zero_point = torch.where(finite, zero_point, 0.0)
    steps = (runs * inverse[:, None]).round() + zero_point[:, None]
    codes = torch.where(finite[:, None], steps.clamp(-128, 127), 0.0)
    return (
        codes.to(torch.int8).reshape(x.shape),
        torch.where(finite, inverse.reciprocal(), math.nan),
        zero_point.to(torch.int32),
    )


def group_norm_mixed(
    x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """Group norm, SiLU behind it where asked for, in float64 and rounded once; then a factor.

    Args:
        x: float32 [B, H, W, C].
        weight: float32 [C].
        bias: float32 [C].
        factor: float32 [C], that the rounded result is multiplied by.
        groups: Divides C.
        eps: Added to the variance; 0 or more.
        silu: Whether SiLU follows.

    Returns:
        float32 [B, H, W, C].

    Raises:
        ConfigError: A dtype or a shape is wrong.
    """
    check_group_norm(x, weight, bias, factor, groups)
    grouped = x.to(torch.float64).reshape(len(x), -1, groups, x.shape[3] // groups)
    variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
    normal = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
    result = normal * weight.to(torch.float64) + bias.to(torch.float64)
    return (torch.nn.functional.silu(result) if silu else result).to(torch.float32) * factor


def group_norm_quantize_mixed(
    x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_norm_mixed`, then `quantize_mixed` with a part a sample.

    Args and errors are those of `group_norm_mixed`; the results those of `quantize_mixed`.
    """
    return quantize_mixed(group_norm_mixed(x, weight, bias, factor, groups, eps, silu), len(x))


def conv2d_mixed(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    weight: Tensor,
    out_channels: int,
    kernel: int,
    stride: int,
    padding: int,
    upsampling: int = 1,
) -> Tensor:
    """Convolution of codes with the weights of a blob.

    Args:
        codes: int8 [B, H, W, C].
        scale: float32 [R], of R equal parts of the codes: whole samples, or with a 1x1 kernel of
            stride 1, without upsampling, any pixels. NaN gives NaN.
        zero_point: int32 [R], -128 to 127.
        weight: Blob, uint8 [bytes].
        out_channels: Rows of the blob.
        kernel: Of the blob, 1 or 3.
        stride: 1 or 2.
        padding: 0 or ``kernel // 2``; with the number zero.
        upsampling: 1 or 2, times that each pixel is there in both directions before it is read.

    Returns:
        float32 [B, Ho, Wo, out_channels].

    Raises:
        ConfigError: A dtype, a shape or a number is wrong, or the blob is another layer's.
        ArtifactError: The blob is damaged.
    """
    shape = conv2d_shape(codes, out_channels, kernel, stride, padding, upsampling)
    content = _content(weight, out_channels, kernel, codes.shape[-1])
    parts, batch = _check_ranges(scale, zero_point), len(codes)
    pixels = batch * shape[1] * shape[2]
    if batch % parts and ((kernel, stride, upsampling) != (1, 1, 1) or pixels % parts):
        raise ConfigError(
            f"conv2d_mixed: {parts} ranges for {batch} samples; use one for each sample, or a 1x1 "
            "kernel of stride 1"
        )
    inputs = _centred(codes, zero_point)
    for axis in (1, 2) if upsampling > 1 else ():
        inputs = inputs.repeat_interleave(upsampling, dim=axis)
    weights = content.codes.to(torch.float32).reshape(out_channels, kernel, kernel, -1)
    sums = exact_convolution(inputs, weights, stride, padding)
    return _scaled(sums, scale, content).reshape(shape)


def linear_mixed(
    codes: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, out_features: int
) -> Tensor:
    """Linear layer on codes with the weights of a blob.

    Args:
        codes: int8 [..., depth].
        scale: float32 [R], of R equal parts of the codes, each of whole rows. NaN gives NaN.
        zero_point: int32 [R], -128 to 127.
        weight: Blob, uint8 [bytes].
        out_features: Rows of the blob.

    Returns:
        float32 [..., out_features].

    Raises:
        ConfigError: A dtype, a shape or a number is wrong, or the blob is another layer's.
        ArtifactError: The blob is damaged.
    """
    shape = linear_shape(codes, out_features)
    content = _content(weight, out_features, 1, codes.shape[-1])
    parts, rows = _check_ranges(scale, zero_point), codes.numel() // codes.shape[-1]
    if rows % parts:
        raise ConfigError(f"linear_mixed: {parts} ranges do not cut {rows} rows into equal parts")
    inputs = _centred(codes, zero_point).reshape(rows, -1)
    sums = exact_product(inputs, content.codes.to(torch.float32))
    return _scaled(sums, scale, content).reshape(shape)


def check_group_norm(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, groups: int) -> None:
    """Refuse what `group_norm_mixed` refuses."""
    check_dtype("x", x, torch.float32)
    channels = x.shape[-1] if x.ndim == 4 else None
    if channels is None:
        raise ConfigError(f"group_norm_mixed: x [B, H, W, C] expected, got {list(x.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("factor", factor)):
        check_dtype(name, tensor, torch.float32)
        if tensor.shape != (channels,):
            raise ConfigError(
                f"group_norm_mixed: {name} [{channels}] expected for x {list(x.shape)}, got "
                f"{list(tensor.shape)}"
            )
    if groups < 1 or channels % groups:
        raise ConfigError(f"group_norm_mixed: {channels} channels have no {groups} equal groups")


def conv2d_shape(
    codes: Tensor, out_channels: int, kernel: int, stride: int, padding: int, upsampling: int = 1
) -> tuple[int, int, int, int]:
    """Shape of the result of `conv2d_mixed`; checks the numbers."""
    check_dtype("codes", codes, torch.int8)
    if codes.ndim != 4:
        raise ConfigError(f"conv2d_mixed: codes [B, H, W, C] expected, got {list(codes.shape)}")
    if kernel not in (1, 3) or stride not in (1, 2) or padding not in (0, kernel // 2):
        raise ConfigError(
            f"conv2d_mixed: kernel {kernel}, stride {stride}, padding {padding}; the kernel is 1 "
            "or 3, the stride 1 or 2, the padding 0 or half the kernel"
        )
    if upsampling not in (1, 2):
        raise ConfigError(f"conv2d_mixed: upsampling {upsampling}, not 1 or 2")
    batch, *sides, _ = codes.shape
    height, width = (upsampling * side for side in sides)
    if height + 2 * padding < kernel or width + 2 * padding < kernel:
        raise ConfigError(f"conv2d_mixed: {height}x{width} codes are smaller than the kernel")
    out_height = (height + 2 * padding - kernel) // stride + 1
    return batch, out_height, (width + 2 * padding - kernel) // stride + 1, out_channels


def linear_shape(codes: Tensor, out_features: int) -> tuple[int, ...]:
    """Shape of the result of `linear_mixed`; checks the codes."""
    check_dtype("codes", codes, torch.int8)
    if codes.ndim < 1:
        raise ConfigError("linear_mixed: codes [..., depth] expected, got a single number")
    return (*codes.shape[:-1], out_features)


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor of another dtype.

    Raises:
        ConfigError: Names the tensor and both dtypes.
    """
    if tensor.dtype != dtype:
        raise ConfigError(f"{name}: {dtype} expected, got {tensor.dtype}")


def _check_ranges(scale: Tensor, zero_point: Tensor) -> int:
    """How many parts of the codes have a range."""
    check_dtype("scale", scale, torch.float32)
    check_dtype("zero_point", zero_point, torch.int32)
    if scale.ndim != 1 or scale.shape != zero_point.shape or not len(scale):
        raise ConfigError(
            f"scale and zero_point: one each for every part expected, got {list(scale.shape)} and "
            f"{list(zero_point.shape)}"
        )
    if bool((zero_point < -128).any()) or bool((zero_point > 127).any()):
        raise ConfigError("zero_point: outside -128..127")
    return len(scale)


def _content(weight: Tensor, rows: int, kernel: int, channels: int) -> BlobContent:
    content = _unpacked(weight.detach().cpu().contiguous().numpy().tobytes())
    stored = (len(content.codes), content.kernel, content.channels)
    if stored != (rows, kernel, channels):
        raise ConfigError(
            f"weight: a blob of {stored[0]} rows, kernel {stored[1]} and {stored[2]} channels; the "
            f"call needs {rows}, {kernel} and {channels}"
        )
    return content


@functools.lru_cache(maxsize=_CACHED_BLOBS)
def _unpacked(octets: bytes) -> BlobContent:
    """By content, which no later change of a tensor makes wrong."""
    return unpack_blob(torch.frombuffer(bytearray(octets), dtype=torch.uint8))


def _centred(codes: Tensor, zero_point: Tensor) -> Tensor:
    """``code - zero_point`` in float32."""
    parts = codes.to(torch.float32).reshape(len(zero_point), -1)
    return (parts - zero_point[:, None]).reshape(codes.shape)


def _scaled(sums: Tensor, scale: Tensor, content: BlobContent) -> Tensor:
    """Results [pixels, rows] of exact sums: every step is rounded to float32."""
    parts = sums.to(torch.float32).reshape(len(scale), -1, sums.shape[1])
    result = parts * (scale[:, None, None] * content.scale)
    if content.bias is not None:
        result = result + content.bias
    return result
