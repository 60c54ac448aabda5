"""Exact sums of products of whole numbers by float32 matrix products.

A float32 holds every whole number up to 2^24. So a product of matrices of small whole numbers is
exact in any order of its sums, as long as no sum can pass that. Longer sums are cut into pieces
that cannot, and the pieces are added in float64. A float32 product takes half the time of a float64
one, and a fraction of a convolution's in float64, which has no kernels of its own.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["exact_convolution", "exact_product"]

_EXACT = 1 << 24


def exact_product(inputs: Tensor, weights: Tensor) -> Tensor:
    """``inputs @ weights.T``, exact.

    Args:
        inputs: float32 [P, K], whole numbers.
        weights: float32 [R, K], whole numbers; of both, the largest product is at most 2^24, and
            the sums are below 2^53.

    Returns:
        [P, R] whole numbers, float32 if it holds whatever such inputs give, else float64.
    """
    return _summed([(inputs, weights)], _piece(inputs, weights))


def exact_convolution(images: Tensor, weights: Tensor, stride: int, padding: int) -> Tensor:
    """Convolution, exact: a product for each place of the kernel.

    Args:
        images: float32 [B, H, W, C], whole numbers, bounded as of `exact_product`.
        weights: float32 [R, kernel, kernel, C], whole numbers.
        stride: Of both axes.
        padding: Zeros on all sides.

    Returns:
        [B * Ho * Wo, R], as of `exact_product`.
    """
    return _summed(_places(images, weights, stride, padding), _piece(images, weights))


def _piece(inputs: Tensor, weights: Tensor) -> int:
    """How many products can be summed in float32."""
    return int(_EXACT // max(1.0, float(inputs.abs().max()) * float(weights.abs().max())))


def _places(
    images: Tensor, weights: Tensor, stride: int, padding: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What each place of a kernel reads, [B * Ho * Wo, C], and its weights, [R, C]."""
    kernel, channels = weights.shape[1], weights.shape[3]
    padded = torch.nn.functional.pad(images, (0, 0, *[padding] * 4))
    height, width = ((size - kernel) // stride + 1 for size in padded.shape[1:3])
    for row in range(kernel):
        rows = padded[:, row : row + stride * height : stride]
        for column in range(kernel):
            read = rows[:, :, column : column + stride * width : stride]
            yield read.reshape(-1, channels), weights[:, row, column]


def _summed(pairs: Iterable[tuple[Tensor, Tensor]], piece: int) -> Tensor:
    """Sum of the products of all pairs, no more than `piece` of them in float32."""
    total, part, depth = None, None, 0
    for inputs, weights in pairs:
        for start in range(0, inputs.shape[1], piece):
            left, right = inputs[:, start : start + piece], weights[:, start : start + piece].T
            if part is not None and depth + left.shape[1] > piece:
                total = part.to(torch.float64) if total is None else total.add_(part)
                part, depth = None, 0
            part = left @ right if part is None else part.addmm_(left, right)
            depth += left.shape[1]
    assert part is not None
    return part if total is None else total.add_(part)
