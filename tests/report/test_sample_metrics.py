import math
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.report.networks import Networks
from mpqdm_fx.report.sample_metrics import (
    class_accuracy,
    frechet_distance,
    kernel_distance,
    psnr,
    ssim,
    structural_window,
    x0_median_sqnr,
)


def images(count, side, seed, channels=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def noisy(pictures, amount, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return (pictures + amount * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)


def direct_ssim(first, second):
    """Equation 13 of Wang et al. 2004 with scipy's filters, picture by picture."""
    window, deviation = structural_window(*first.shape[-2:])

    def blur(values):
        return ndimage.gaussian_filter(values, deviation, mode="mirror", radius=window // 2)

    c1, c2 = 0.01**2, 0.03**2
    similarities = []
    for x, y in zip(first.double().numpy(), second.double().numpy(), strict=True):
        for a, b in zip((x + 1) / 2, (y + 1) / 2, strict=True):
            mean_a, mean_b = blur(a), blur(b)
            variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
            covariance = blur(a * b) - mean_a * mean_b
            similarities.append(
                ((2 * mean_a * mean_b + c1) * (2 * covariance + c2))
                / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
            )
    return float(np.mean(similarities))


@pytest.mark.parametrize("side", [32, 16, 8, 5, 3])
def test_ssim_equals_the_direct_formula_however_small_the_pictures_are(side):
    first = images(3, side, 0)
    second = noisy(first, 0.3)
    assert ssim(first, second) == pytest.approx(direct_ssim(first, second), rel=1e-6)


@pytest.mark.parametrize(
    ("side", "window"), [(64, 11), (16, 11), (11, 11), (10, 9), (8, 7), (4, 3), (3, 3)]
)
def test_the_window_of_ssim_is_the_papers_where_it_fits_and_else_the_largest_odd_one(side, window):
    size, deviation = structural_window(side, side + 4)
    assert size == window
    assert deviation / (size // 2) == pytest.approx(0.3)


def test_psnr_equals_the_direct_formula_of_clipped_pictures():
    first = images(3, 16, 0, channels=3)
    second = noisy(first, 0.3)
    error = ((first.double() - second.double()) / 2).square().mean()
    assert psnr(first, second) == pytest.approx(float(-10 * error.log10()), rel=1e-6)
    assert psnr(first, second + (second == 1) * 5) == pytest.approx(psnr(first, second))


def test_equal_pictures_are_perfect():
    pictures = images(2, 16, 0)
    assert ssim(pictures, pictures) == pytest.approx(1.0)
    assert psnr(pictures, pictures) == float("inf")


def test_more_noise_is_worse_for_both():
    pictures = images(4, 16, 0)
    near, far = noisy(pictures, 0.1), noisy(pictures, 0.5)
    assert ssim(pictures, near) > ssim(pictures, far)
    assert psnr(pictures, near) > psnr(pictures, far)


def direct_kernel_distance(first, second):
    """Mean kernel within each set, less that between them, pair by pair."""
    x, y = first.double().numpy(), second.double().numpy()

    def mean(rows, columns):
        return np.mean([(float(a @ b) / x.shape[1] + 1) ** 3 for a in rows for b in columns])

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_kernel_distance_equals_the_direct_sum():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 6, generator=generator)
    second = 1.4 * torch.randn(30, 6, generator=generator) + 0.5
    expected = direct_kernel_distance(first, second)
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_pairs_is_zero_for_equal_sets_and_grows_with_the_noise():
    features = 20 * torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    near, far = (features + s * noisy(torch.zeros(30, 4), 1.0) for s in (0.1, 3.0))
    assert kernel_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert 0 <= kernel_distance(features, near) < kernel_distance(features, far)


@pytest.mark.parametrize(
    ("function", "first", "second", "message"),
    [
        (kernel_distance, (5, 4), (5, 3), "kernel_distance"),
        (kernel_distance, (1, 4), (1, 4), "at least 2"),
        (psnr, (2, 1, 8, 8), (3, 1, 8, 8), "of one shape"),
        (ssim, (2, 8, 8), (2, 8, 8), "N, C, H, W"),
        (ssim, (2, 1, 2, 8), (2, 1, 2, 8), "3x3 is the smallest"),
    ],
)
def test_sets_that_do_not_fit_are_refused(function, first, second, message):
    with pytest.raises(ConfigError, match=message):
        function(torch.zeros(first), torch.zeros(second))


def test_missing_torchmetrics_says_what_to_install(monkeypatch):
    for name in ("torchmetrics.image", "torchmetrics.image.kid"):
        monkeypatch.setitem(sys.modules, name, None)
    for function in (psnr, ssim):
        with pytest.raises(ConfigError, match=r"mpqdm-fx\[report\]"):
            function(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16))
    with pytest.raises(ConfigError, match=r"mpqdm-fx\[report\]"):
        kernel_distance(torch.zeros(5, 4), torch.zeros(5, 4))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_features_that_are_no_numbers_have_no_distance_and_not_the_best_one(distance, broken):
    first = images(8, 2, 0).flatten(1)
    second = first.clone()
    second[3, 1] = broken
    assert math.isnan(distance(first, second))
    assert math.isnan(distance(second, first))
    assert distance(first, first) == pytest.approx(0, abs=1e-6)


def test_a_sample_of_nan_is_the_worst_in_the_median_wherever_it_stands():
    expected = torch.ones(5, 1, 4, 4)
    ratios = [10, 20, 30, 40]
    off = torch.tensor([10 ** (-ratio / 20) for ratio in ratios])
    for place in range(5):
        errors = torch.cat([off[:place], torch.tensor([math.nan]), off[place:]])
        actual = expected + errors.view(-1, 1, 1, 1)
        assert x0_median_sqnr(expected, actual) == pytest.approx(20, abs=1e-3)
    assert math.isnan(x0_median_sqnr(expected, expected * math.nan))


def test_logits_of_nan_show_no_class():
    logits = torch.eye(4)
    labels = torch.arange(4)
    logits[0] = math.nan  # of which the first is the largest
    assert class_accuracy(logits, labels) == pytest.approx(0.75)
    assert class_accuracy(logits * math.nan, labels) == 0


def test_networks_that_take_pixels_of_eight_bits_do_not_hide_pictures_of_nan():
    networks = Networks(
        inception=lambda pixels, return_features: pixels.float().flatten(1),
        clip=lambda pixels, texts: 50.0,
    )
    pictures = images(3, 4, 0)
    pictures[1, 0, 2, 2] = math.nan
    features = networks.inception_features(pictures)
    assert features.isnan().any(dim=1).tolist() == [False, True, False]
    assert math.isnan(networks.clip_score(pictures, ["a"] * 3))
    assert networks.clip_score(pictures[:1], ["a"]) == 50
