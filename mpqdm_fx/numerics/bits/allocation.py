"""Outlier-driven mixed quantization (OMQ): which channels get one bit more, and which one less.

MPQ-DM (arXiv 2412.11549): channels are ranked by the kurtosis of their smoothed weights; a share at
the top gets N + 1 bits, as large a share at the bottom N - 1, so the layer's average is exactly N.
The share is the one with the least error of the layer's output, with quantized activations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.numerics.levels.grids import MAX_BITS, dequantize
from mpqdm_fx.numerics.solve.scales import quantize_uniform

__all__ = [
    "PROMOTED_FRACTIONS",
    "OmqChoice",
    "choose_fraction",
    "mixed_error",
    "omq_bits",
    "omq_search",
    "output_errors",
]

PROMOTED_FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Shares of channels that are promoted, and as many demoted: the paper's search grid."""


@dataclass(frozen=True, kw_only=True)
class OmqChoice:
    """What `omq_search` decided for one layer.

    Attributes:
        bits: Width of each output channel, int64 [O]; its mean is exactly the base width.
        fraction: The chosen share of promoted channels.
        errors: Mean squared output error of each candidate fraction, in their order.
    """

    bits: Tensor
    fraction: float
    errors: tuple[float, ...]


def omq_bits(score: Tensor, base_bits: int, fraction: float) -> Tensor:
    """Give the channels of highest score one bit more, those of lowest score one less.

    Args:
        score: Outlier score of each channel [O], not NaN. Of equal scores the earlier channel
            ranks higher.
        base_bits: Average width N, 1 to 8. At 1 and 8 nothing moves: 0 and 9 bits do not exist.
        fraction: Share of channels to promote, 0 to 0.5; ``floor(fraction * O)`` are promoted and
            as many demoted, so a layer of few channels may have none.

    Returns:
        int64 [O]; its mean is exactly ``base_bits``; a higher score never gets fewer bits.

    Raises:
        ConfigError: ``base_bits`` or ``fraction`` is out of range, or ``score`` is no vector.
        CalibrationError: A score is NaN.
    """
    if not 1 <= base_bits <= MAX_BITS:
        raise ConfigError(f"base_bits is {base_bits}; use 1 to {MAX_BITS}")
    if not 0 <= fraction <= 0.5:
        raise ConfigError(f"fraction is {fraction}; use 0 to 0.5, each half of the channels once")
    if score.ndim != 1:
        raise ConfigError(f"score must be one number per channel, got {tuple(score.shape)}")
    if bool(score.isnan().any()):
        raise CalibrationError("an outlier score is NaN; check the weights and activation peaks")
    bits = torch.full((len(score),), base_bits, dtype=torch.int64)
    # The epsilon keeps a product like 0.3 * 10 from falling below its integer.
    moved = int(fraction * len(score) + 1e-9) if 1 < base_bits < MAX_BITS else 0
    if moved:
        order = torch.argsort(score.detach().cpu(), descending=True, stable=True)
        bits[order[:moved]] += 1
        bits[order[-moved:]] -= 1
    return bits


def choose_fraction(errors: Tensor | Sequence[float]) -> int:
    """Return the index of the least error; of equal ones the first, which moves fewer channels.

    Args:
        errors: Output error of each candidate, in ascending order of fractions.

    Returns:
        The index.

    Raises:
        CalibrationError: No candidate, or an error that is NaN or infinite for all of them.
    """
    values = torch.as_tensor(errors, dtype=torch.float64).flatten()
    usable = torch.where(values.isnan(), math.inf, values)
    if not len(usable) or not bool(torch.isfinite(usable).any()):
        raise CalibrationError(
            f"no usable error among the candidates {values.tolist()}; the recorded activations "
            "hold NaN or infinity"
        )
    return int((usable == usable.min()).nonzero()[0, 0])


def output_errors(W: Tensor, W_hat: Tensor, X: Tensor, X_hat: Tensor) -> Tensor:
    """Return each channel's mean squared output error ``|X w_o - X_hat w_hat_o|^2 / P``.

    Args:
        W: Float weight rows [O, K].
        W_hat: Quantized weight rows [O, K].
        X: Float input rows: [P, K], or [P, G, K] for a grouped layer, whose group g multiplies
            rows ``g O/G .. (g + 1) O/G`` of the weight (torch's order of a grouped convolution;
            K counts one group's inputs).
        X_hat: The same rows, fake-quantized.

    Returns:
        float64 [O].

    Raises:
        ConfigError: The shapes do not fit.
    """
    grouped = X if X.ndim != 2 else X[:, None, :]
    fits = grouped.ndim == 3 and W.ndim == 2 and grouped.shape[2] == W.shape[1]
    if not fits or len(W) % grouped.shape[1] or X.shape != X_hat.shape or W.shape != W_hat.shape:
        raise ConfigError(
            f"output error: weights {tuple(W.shape)}, {tuple(W_hat.shape)} and inputs "
            f"{tuple(X.shape)}, {tuple(X_hat.shape)} do not fit; inputs are [P, K] or [P, G, K]"
        )

    def outputs(rows: Tensor, weight: Tensor) -> Tensor:
        # [G, P, K] @ [G, K, O/G] -> [G, P, O/G]
        return rows.view(grouped.shape).transpose(0, 1) @ weight.view(
            grouped.shape[1], -1, weight.shape[1]
        ).transpose(1, 2)

    W, W_hat, X, X_hat = (t.detach().to(torch.float32).contiguous() for t in (W, W_hat, X, X_hat))
    difference = (outputs(X, W) - outputs(X_hat, W_hat)).to(torch.float64)
    return difference.square_().mean(dim=1).flatten()


def mixed_error(errors: Tensor, widths: Tensor, bits: Tensor) -> float:
    """Return the mean squared output error of a layer with mixed widths.

    ``|X W^T - X_hat Q(W | bits)^T|^2`` separates over output channels, so every mix follows from
    one measurement per width.

    Args:
        errors: Error of each channel at each width, [V, O].
        widths: The widths, ascending int64 [V].
        bits: Width of each channel, int64 [O], each one of ``widths``.

    Returns:
        The mean over channels.
    """
    index = torch.searchsorted(widths, bits)
    return float(errors.to(torch.float64).gather(0, index[None]).mean())


def omq_search(
    W: Tensor,
    X: Tensor,
    X_hat: Tensor,
    score: Tensor,
    base_bits: int,
    quantize: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = quantize_uniform,
) -> OmqChoice:
    """Choose how many channels to promote and demote, by the layer's output error.

    Minimises ``|X W^T - X_hat Q(W | bits)^T|^2`` over `PROMOTED_FRACTIONS` (MPQ-DM's
    objective; its code leaves the activations in float, we follow the paper). Only three
    quantizations are made, at N - 1, N and N + 1 bits; every candidate mixes their rows.

    Args:
        W: Weight rows [O, K].
        X: Float input rows, [P, K] or [P, G, K] for grouped layers; see `output_errors`.
        X_hat: The same rows, fake-quantized with the layer's activation range.
        score: Outlier score [O]: kurtosis of the smoothed rows.
        base_bits: Average width N, 1 to 8; at 1 and 8 the only candidate is fraction 0.
        quantize: ``(W, bits) -> (codes, scale)``, for instance `quantize_codebook`, or a lambda
            that passes an importance.

    Returns:
        Bits, fraction and the error of every candidate.

    Raises:
        ConfigError: Shapes or ranges are wrong.
        CalibrationError: Weights, scores or activations are not finite.
    """
    shares = PROMOTED_FRACTIONS if 1 < base_bits < MAX_BITS else (0.0,)
    candidates = [omq_bits(score, base_bits, share) for share in shares]
    widths = torch.tensor(sorted({width for bits in candidates for width in bits.tolist()}))
    errors = torch.stack(
        [
            output_errors(W, dequantize(*quantize(W, torch.full((len(W),), width))), X, X_hat)
            for width in widths.tolist()
        ]
    )
    measured = [mixed_error(errors, widths, bits) for bits in candidates]
    best = choose_fraction(measured)
    return OmqChoice(bits=candidates[best], fraction=shares[best], errors=tuple(measured))
