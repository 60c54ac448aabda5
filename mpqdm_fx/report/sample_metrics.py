"""Numbers of two sets of samples, by torchmetrics: distances of features, likeness of pictures."""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.numerics.metrics import sqnr_db

__all__ = [
    "SMALLEST_SET",
    "class_accuracy",
    "frechet_distance",
    "from_torchmetrics",
    "kernel_distance",
    "measures_pictures",
    "psnr",
    "ssim",
    "structural_window",
    "x0_median_sqnr",
    "x0_sqnr",
]

SMALLEST_SET = 2
"""Samples of a set that has a covariance, and so a distance from another set."""

_WINDOW = 11  # pixels of a side, and its Gaussian's deviation: Wang et al. 2004
_DEVIATION = 1.5
_BATCH = 16


def measures_pictures() -> bool:
    """Whether what measures pictures is installed: torchmetrics."""
    return importlib.util.find_spec("torchmetrics") is not None


def x0_sqnr(reference_images: Tensor, images: Tensor) -> float:
    """Compare final samples drawn from the same noise.

    Args:
        reference_images: Of the float model, float [N, ...].
        images: Of the other model from the same noise, same shape.

    Returns:
        Decibels; inf when identical.

    Raises:
        ConfigError: The shapes differ.
    """
    return sqnr_db(reference_images, images)


def x0_median_sqnr(reference_images: Tensor, images: Tensor) -> float:
    """Compare final samples one by one: what the sample in the middle has.

    The ratio over all samples together is that of the few that went elsewhere; this one is what to
    expect of a picture.

    Args:
        reference_images: Of the float model, float [N, ...], N at least 1.
        images: Of the other model from the same noise, same shape.

    Returns:
        Decibels, of an even number of samples the lower of the two in the middle; inf when
        identical. A sample that holds NaN is worse than any other.

    Raises:
        ConfigError: The shapes differ.
    """
    if reference_images.shape != images.shape:
        raise ConfigError(
            f"x0_median_sqnr: shapes {tuple(reference_images.shape)} and {tuple(images.shape)} "
            "differ; give samples from the same noise"
        )
    ratios = [sqnr_db(one, other) for one, other in zip(reference_images, images, strict=True)]
    # NaN compares with nothing: a plain sort would leave the others in no order
    ordered = sorted(ratios, key=lambda ratio: (not math.isnan(ratio), ratio))
    return ordered[(len(ratios) - 1) // 2]


def frechet_distance(reference_features: Tensor, features: Tensor) -> float:
    """Return the Frechet distance of two sets of features, each taken as a Gaussian.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` (Heusel et al. 2017, equation 6), with
    torchmetrics, in float64. With few samples it is biased upwards; between sets drawn from the
    same noise it is a paired measure whose floor is zero.

    Args:
        reference_features: Float [N, D], N at least 2.
        features: Float [M, D], M at least 2.

    Returns:
        The distance, in squared units of the features; rounding below zero is clipped; NaN where
        a feature is no finite number.

    Raises:
        ConfigError: torchmetrics is missing, or the shapes do not fit.
    """
    _check_features("frechet_distance", reference_features, features)
    if not _all_finite(reference_features, features):
        return math.nan
    kind = from_torchmetrics("image.fid", "FrechetInceptionDistance")
    metric = kind(feature=_PassFeatures(reference_features.shape[1]), normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(reference_features.detach().double(), real=True)
    metric.update(features.detach().double(), real=False)
    return _at_least_zero(float(metric.compute()))


def kernel_distance(reference_features: Tensor, features: Tensor) -> float:
    """Return the kernel distance (KID) of two sets of features that were drawn from the same noise.

    The squared maximum mean discrepancy with torchmetrics' kernel of KID, `(x·y / D + 1)^3`
    (Binkowski et al. 2018, section 3.1), in float64, over all samples at once. KID's usual
    estimate leaves the pairs of a sample with itself out, which takes bias away for sets drawn
    apart; sets of the same noise have such pairs between them too, and that estimate falls far
    below zero. Here all pairs count: the distance is zero for equal sets, and never negative.

    Args:
        reference_features: Float [N, D], N at least 2.
        features: Float [M, D], M at least 2.

    Returns:
        The squared discrepancy; smaller is better, 0 is best; rounding below zero is clipped; NaN
        where a feature is no finite number.

    Raises:
        ConfigError: torchmetrics is missing, or the shapes do not fit.
    """
    _check_features("kernel_distance", reference_features, features)
    if not _all_finite(reference_features, features):
        return math.nan
    kernel = from_torchmetrics("image.kid", "poly_kernel")
    expected, actual = reference_features.detach().double(), features.detach().double()
    within = kernel(expected, expected).mean() + kernel(actual, actual).mean()
    return _at_least_zero(float(within - 2 * kernel(expected, actual).mean()))


def psnr(reference_images: Tensor, images: Tensor) -> float:
    """Return the peak signal-to-noise ratio of pictures, with torchmetrics.

    Args:
        reference_images: Float [N, C, H, W] in [-1, 1]; values outside are clipped, as a picture's
            file clips them.
        images: From the same noise, same shape.

    Returns:
        Decibels over all pictures together; inf when identical.

    Raises:
        ConfigError: torchmetrics is missing, or the shapes do not fit.
    """
    _check_pictures("psnr", reference_images, images)
    kind = from_torchmetrics("image", "PeakSignalNoiseRatio")
    return _over_pictures(kind(data_range=1.0), reference_images, images)


def ssim(reference_images: Tensor, images: Tensor) -> float:
    """Return the structural similarity of pictures (Wang et al. 2004), with torchmetrics.

    Args:
        reference_images: As of `psnr`; sides of at least 3 pixels.
        images: From the same noise, same shape.

    Returns:
        Mean over pictures and windows (see `structural_window`); 1 when identical.

    Raises:
        ConfigError: torchmetrics is missing, or the shapes do not fit.
    """
    _check_pictures("ssim", reference_images, images)
    window, deviation = structural_window(*reference_images.shape[-2:])
    kind = from_torchmetrics("image", "StructuralSimilarityIndexMeasure")
    metric = kind(data_range=1.0, sigma=deviation, kernel_size=window)
    return _over_pictures(metric, reference_images, images)


def structural_window(height: int, width: int) -> tuple[int, float]:
    """Side and deviation of the Gaussian window that `ssim` looks through.

    The paper's 11 pixels and 1.5, or, where a picture is smaller, the largest odd window in it with
    a deviation in the same ratio.

    Raises:
        ConfigError: A side has fewer than 3 pixels.
    """
    side = min(height, width)
    if side < 3:
        raise ConfigError(f"ssim: pictures of {height}x{width} hold no window; 3x3 is the smallest")
    window = min(_WINDOW, side - 1 + side % 2)
    return window, _DEVIATION * (window // 2) / (_WINDOW // 2)


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is at their label, with torchmetrics.

    Args:
        logits: Float [N, classes].
        labels: Int64 [N].

    Returns:
        A share in 0..1; a row that holds NaN shows no class.

    Raises:
        ConfigError: torchmetrics is missing.
    """
    kind = from_torchmetrics("classification", "MulticlassAccuracy")
    metric = kind(num_classes=logits.shape[1], average="micro")
    sound = ~logits.isnan().any(dim=1)
    if not sound.any():
        return 0.0
    return float(metric(logits[sound], labels[sound])) * (int(sound.sum()) / len(sound))


class _PassFeatures(nn.Identity):
    """torchmetrics' feature extractor for what are features already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size  # torchmetrics asks for it


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _at_least_zero(distance: float) -> float:
    # `max(0.0, nan)` is 0.0, the best distance there is
    return distance if math.isnan(distance) else max(0.0, distance)


def _check_features(name: str, reference_features: Tensor, features: Tensor) -> None:
    for side, matrix in (("reference_features", reference_features), ("features", features)):
        if (
            matrix.ndim != 2
            or len(matrix) < SMALLEST_SET
            or matrix.shape[1] != reference_features.shape[-1]
        ):
            raise ConfigError(
                f"{name}: {side} has shape {tuple(matrix.shape)}; both sets must be "
                "[at least 2, D] with one D"
            )


def _check_pictures(name: str, reference_images: Tensor, images: Tensor) -> None:
    if reference_images.ndim != 4 or reference_images.shape != images.shape:
        raise ConfigError(
            f"{name}: pictures of shapes {tuple(reference_images.shape)} and "
            f"{tuple(images.shape)}; both must be [N, C, H, W] of one shape"
        )


def _over_pictures(metric: Any, reference_images: Tensor, images: Tensor) -> float:
    """A metric of pictures in 0..1, float64, some at once: a window's sums are many times them."""
    metric.set_dtype(torch.float64)
    parts = (torch.split(pictures, _BATCH) for pictures in (reference_images, images))
    for rows in zip(*parts, strict=True):
        expected, actual = ((batch.detach().double().clamp(-1, 1) + 1) / 2 for batch in rows)
        metric.update(actual, expected)
    return float(metric.compute())


def from_torchmetrics(module: str, name: str) -> Any:
    """A class of torchmetrics.

    Args:
        module: Where it is, below `torchmetrics`.
        name: Its name.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return getattr(importlib.import_module(f"torchmetrics.{module}"), name)
    except ImportError as error:
        raise ConfigError(
            'these metrics need torchmetrics; install it with: pip install "mpqdm-fx[report]"'
        ) from error
