import json
import math
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.report.metrics import epsilon_sqnr, evaluate_against, evaluate_denoiser
from mpqdm_fx.report.reference_run import run_reference
from mpqdm_fx.report.sample_metrics import (
    class_accuracy,
    frechet_distance,
    x0_median_sqnr,
    x0_sqnr,
)


def gaussian(count, dim, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return scale * torch.randn(count, dim, generator=generator) @ mixing + shift


def direct_frechet(first, second):
    """The formula itself, with the symmetric square root S1^(1/2) S2 S1^(1/2)."""
    first, second = first.double(), second.double()
    covariances = [torch.cov(features.T) for features in (first, second)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    return float((first.mean(0) - second.mean(0)).square().sum() + traces - 2 * cross)


@pytest.mark.parametrize("count", [256, 40])  # 40 rows of 64 features: singular covariances
def test_frechet_distance_equals_the_direct_formula(count):
    first, second = gaussian(count, 64, 0), gaussian(count, 64, 1, scale=1.3, shift=0.5)
    expected = direct_frechet(first, second)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


@given(seed=st.integers(0, 1000), shift=st.floats(-5, 5))
def test_frechet_distance_of_shifted_features_is_the_squared_shift(seed, shift):
    features = gaussian(50, 4, seed)
    expected = 4 * shift**2
    distance = frechet_distance(features.double(), features.double() + shift)
    assert distance == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_frechet_distance_is_zero_for_equal_sets_and_symmetric():
    first, second = gaussian(256, 64, 0), gaussian(256, 64, 1)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first))


@pytest.mark.parametrize("shape", [(1, 4), (5, 3), (5,)])
def test_frechet_distance_refuses_features_that_do_not_fit(shape):
    with pytest.raises(ConfigError, match="frechet_distance"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(shape))


def test_class_accuracy_is_the_share_of_right_rows_over_all_classes_together():
    logits = torch.eye(4)[torch.tensor([0, 1, 1, 1, 2])]
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 2, 3])) == pytest.approx(0.6)


def test_missing_torchmetrics_is_an_error_that_says_what_to_install(monkeypatch):
    for module in ("torchmetrics.image.fid", "torchmetrics.classification"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"mpqdm-fx\[report\]"):
        frechet_distance(torch.zeros(5, 4), torch.zeros(5, 4))
    with pytest.raises(ConfigError, match=r"mpqdm-fx\[report\]"):
        class_accuracy(torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64))


def test_epsilon_sqnr_pools_signal_and_noise_over_batches():
    batches = [{"x": torch.tensor([1.0, 1.0])}, {"x": torch.tensor([3.0])}]
    noise = iter([torch.tensor([0.1, 0.0]), torch.tensor([0.3])])
    ratio = epsilon_sqnr(lambda x: x, lambda x: (x + next(noise),), batches)
    assert ratio == pytest.approx(10 * math.log10(11 / 0.1), abs=1e-4)


def test_epsilon_sqnr_of_a_model_with_itself_is_infinite():
    assert epsilon_sqnr(lambda x: x, lambda x: x, [{"x": torch.ones(2)}]) == math.inf


def test_epsilon_sqnr_without_inputs_is_refused():
    with pytest.raises(CalibrationError, match="no batch"):
        epsilon_sqnr(lambda x: x, lambda x: x, [])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_the_median_is_the_ratio_of_a_sample_that_as_many_lie_below_as_above(ratios):
    reference = torch.ones(len(ratios), 1, 4, 4)
    errors = torch.tensor([10 ** (-ratio / 20) for ratio in ratios]).view(-1, 1, 1, 1)
    median = x0_median_sqnr(reference, reference + errors)
    assert round(median) in ratios
    assert sum(ratio < round(median) for ratio in ratios) <= len(ratios) / 2
    assert sum(ratio > round(median) for ratio in ratios) <= len(ratios) / 2


def test_the_median_refuses_images_of_another_shape():
    with pytest.raises(ConfigError, match="give samples from the same noise"):
        x0_median_sqnr(torch.ones(2, 1, 4, 4), torch.ones(3, 1, 4, 4))


def test_x0_sqnr_refuses_images_of_another_shape():
    with pytest.raises(ConfigError, match="shape"):
        x0_sqnr(torch.ones(2, 1, 4, 4), torch.ones(3, 1, 4, 4))


class PixelClassifier:
    """Features are pixels; the class is the brightest of the first ten."""

    def features(self, images):
        return images.flatten(1)

    def __call__(self, images):
        return images.flatten(1)[:, :10]


def denoiser(error=0.0):
    def model(sample, timestep, class_labels):
        # pulls the pixel of the class up, the others down: the samples do show their class
        target = torch.nn.functional.one_hot(class_labels, 16).float() * 2 - 1
        return (sample - target.reshape(sample.shape) * (1 + error),)

    return model


SETTINGS = {"num_samples": 40, "num_inference_steps": 4, "batch_size": 16, "seed": 3}


def test_evaluation_of_the_reference_itself_is_perfect():
    metrics = evaluate_denoiser(
        denoiser(),
        denoiser(),
        DDIMScheduler(),
        PixelClassifier(),
        **SETTINGS,
        sample_shape=(1, 4, 4),
    )
    assert metrics.epsilon_sqnr == metrics.x0_sqnr == math.inf
    assert metrics.frechet_distance == pytest.approx(0.0, abs=1e-6)
    assert metrics.accuracy == metrics.reference_accuracy == 1.0
    assert json.loads(json.dumps(metrics.to_dict()))["x0_sqnr"] == "inf"


def test_a_larger_error_is_worse_in_every_distance():
    run = run_reference(denoiser(), DDIMScheduler(), sample_shape=(1, 4, 4), **SETTINGS)
    small, large = (
        evaluate_against(run, denoiser(error), DDIMScheduler(), PixelClassifier())
        for error in (-0.1, -0.5)
    )
    assert small.epsilon_sqnr > large.epsilon_sqnr
    assert small.x0_sqnr > large.x0_sqnr
    assert small.frechet_distance < large.frechet_distance


def test_inputs_of_an_evaluation_cover_every_timestep_with_12_rows():
    run = run_reference(denoiser(), DDIMScheduler(), sample_shape=(1, 4, 4), **SETTINGS)
    timesteps = torch.cat([batch["timestep"] for batch in run.inputs])
    assert timesteps.unique(return_counts=True)[1].tolist() == [12] * 4


def test_evaluation_is_determined_by_its_seed():
    runs = [
        run_reference(
            denoiser(), DDIMScheduler(), sample_shape=(1, 4, 4), **(SETTINGS | {"seed": s})
        )
        for s in (3, 3, 4)
    ]
    assert torch.equal(runs[0].images, runs[1].images)
    assert not torch.equal(runs[0].inputs[0]["sample"], runs[2].inputs[0]["sample"])


def test_a_model_that_draws_nan_has_nothing_that_looks_good():
    def broken(**inputs):
        return (denoiser()(**inputs)[0] * math.nan,)

    metrics = evaluate_denoiser(
        denoiser(), broken, DDIMScheduler(), PixelClassifier(), **SETTINGS, sample_shape=(1, 4, 4)
    )
    record = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert (record.pop("accuracy"), record.pop("reference_accuracy")) == (0, 1)
    del record["num_samples"], record["num_inference_steps"], record["seed"]
    assert set(record.values()) == {"nan"}
    assert {"frechet_distance", "kernel_distance"} <= record.keys()


def test_a_single_sample_has_no_distance_of_sets_and_all_other_metrics():
    settings = {**SETTINGS, "num_samples": 1, "sample_shape": (1, 4, 4)}
    metrics = evaluate_denoiser(
        denoiser(), denoiser(0.1), DDIMScheduler(), PixelClassifier(), **settings
    )
    assert (metrics.frechet_distance, metrics.kernel_distance) == (None, None)
    assert metrics.accuracy == metrics.reference_accuracy == 1
    assert math.isfinite(metrics.x0_sqnr)
