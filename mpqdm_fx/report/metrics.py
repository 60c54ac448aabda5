"""How far a quantized denoiser is from the float one: along the way, at the end, and by class.

Several numbers, because none is enough alone: `epsilon_sqnr` feeds both models the same inputs
(teacher forcing) and resolves small differences; `x0_sqnr` lets both run freely from the same
noise, `psnr` and `ssim` look at the same samples as pictures, latents decoded; the paired Frechet
distance (Heusel et al. 2017, equation 6) and the kernel distance compare the sets of samples in a
classifier's features; the accuracy says whether the samples still show their class.
`gates.METRICS` lists them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.calibration.samplers import Denoiser
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.io.progress import stage
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.records.validation import Count, Seed
from mpqdm_fx.report.networks import Networks
from mpqdm_fx.report.reference_run import (
    EVALUATION_SEED,
    Decode,
    ReferenceRun,
    outputs_of,
    run_reference,
)
from mpqdm_fx.report.sample_metrics import (
    SMALLEST_SET,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    measures_pictures,
    psnr,
    ssim,
    x0_median_sqnr,
    x0_sqnr,
)

__all__ = [
    "EvaluationResult",
    "FeatureClassifier",
    "epsilon_sqnr",
    "evaluate_against",
    "evaluate_denoiser",
]


class FeatureClassifier(Protocol):
    """A classifier with a feature layer, such as `DigitsClassifier`."""

    def features(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [N, classes] of images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """A quantized denoiser measured against the float one; None is what could not be measured.

    Attributes:
        epsilon_sqnr: Decibels, teacher-forced, on held-out trajectories; inf for identical outputs.
        x0_sqnr: Decibels of the final samples from the same noise.
        x0_median_sqnr: Decibels of the sample in the middle, by its own ratio.
        psnr: Peak signal-to-noise ratio of the samples as pictures, decibels.
        ssim: Structural similarity of the samples as pictures, up to 1.
        frechet_distance: Between both sets of samples, in the classifier's features; 0 is best.
        kernel_distance: Between the same sets; see `sample_metrics.kernel_distance`.
        accuracy: Share of the quantized model's samples that are classified as their class, 0..1.
        reference_accuracy: The same of the float model's samples.
        inception_distance: Frechet distance (FID) in Inception's features.
        inception_kernel_distance: Kernel distance (KID) in Inception's features.
        lpips: Mean perceptual distance of the samples as pictures, pair by pair.
        clip_score: Mean likeness of the quantized model's pictures and their prompts, 0..100.
        reference_clip_score: The same of the float model's pictures.
        num_samples: Samples drawn from each model.
        num_inference_steps: Steps of the schedule; None with a `Sampler`.
        seed: Of the evaluation.
    """

    epsilon_sqnr: float
    x0_sqnr: float
    x0_median_sqnr: float
    psnr: float | None = None
    ssim: float | None = None
    frechet_distance: float | None = None
    kernel_distance: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    inception_distance: float | None = None
    inception_kernel_distance: float | None = None
    lpips: float | None = None
    clip_score: float | None = None
    reference_clip_score: float | None = None
    num_samples: int
    num_inference_steps: int | None
    seed: int

    def to_dict(self) -> dict[str, float | int | str]:
        """What was measured, for JSON; no finite numbers become `"inf"`, `"-inf"` and `"nan"`."""
        return {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in dataclasses.asdict(self).items()
            if value is not None
        }


def epsilon_sqnr(
    reference: Denoiser, quantized: Denoiser, inputs: Iterable[Mapping[str, Any]]
) -> float:
    """Compare two denoisers' outputs on the same inputs (teacher forcing).

    Args:
        reference: the float model, called with each batch as keywords.
        quantized: the other model, called the same way.
        inputs: batches of keyword arguments, for instance held-out `Trajectories`.

    Returns:
        The signal-to-quantization-noise ratio over all batches together, in decibels.

    Raises:
        CalibrationError: there is no batch, one cannot be used, or a model returns no tensor.
    """
    batches = list(inputs)
    check_calls(batches, "batch")
    return _sqnr_of_batches(outputs_of(reference, batches), outputs_of(quantized, batches))


@torch.no_grad()
def evaluate_against(
    run: ReferenceRun,
    quantized: Denoiser,
    scheduler: Any,
    classifier: FeatureClassifier | None = None,
    *,
    networks: Networks | None = None,
    images: Tensor | None = None,
) -> EvaluationResult:
    """Measure a quantized denoiser against a run of the float one.

    Args:
        run: From `run_reference` or `reference_run`.
        quantized: Called like the float model.
        scheduler: The scheduler that the run was made with.
        classifier: Judge of classes and space of features; None leaves these metrics out.
        networks: Further judges of pictures.
        images: What `run.draw` gave for the quantized model, where it was drawn already.

    Returns:
        What was measured; samples that are no pictures have no metrics of pictures, and none has
        them where torchmetrics is not installed. A single sample has no distance of sets.

    Raises:
        CalibrationError: The model returns no tensor.
        ConfigError: A network does not take the samples, or they are no pictures or were told no
            text, which it judges; with a classifier, torchmetrics is missing.
    """
    if images is None:
        images = run.draw(quantized, scheduler)
    outputs = outputs_of(quantized, run.inputs, "quantized outputs")
    shown = _shown(run, images, networks or Networks())
    with stage("metrics"):
        metrics = _of_pictures(run.prompts, shown, networks or Networks())
        if classifier is not None:
            metrics |= _of_classes(run, images, classifier)
    return EvaluationResult(
        epsilon_sqnr=_sqnr_of_batches(run.outputs, outputs),
        x0_sqnr=x0_sqnr(run.images, images),
        x0_median_sqnr=x0_median_sqnr(run.images, images),
        num_samples=len(run.images),
        num_inference_steps=run.num_inference_steps,
        seed=run.seed,
        **metrics,
    )


def _of_classes(
    run: ReferenceRun, images: Tensor, classifier: FeatureClassifier
) -> dict[str, float]:
    """Metrics of samples that are to show classes."""
    labels = run.runs["conditions"]["class_labels"]
    metrics = {
        "accuracy": class_accuracy(classifier(images), labels),
        "reference_accuracy": class_accuracy(classifier(run.images), labels),
    }
    if len(images) < SMALLEST_SET:
        return metrics
    features = classifier.features(run.images), classifier.features(images)
    return {
        "frechet_distance": frechet_distance(*features),
        "kernel_distance": kernel_distance(*features),
        **metrics,
    }


def _shown(run: ReferenceRun, images: Tensor, networks: Networks) -> tuple[Tensor, Tensor] | None:
    """Samples of the float model, and of the other one, as pictures; None if they are none."""
    if not networks.metrics and not measures_pictures():
        return None
    expected, pictures = run.pictures, run.as_pictures(images)
    if expected is not None and pictures is not None:
        return expected, pictures
    if networks.metrics:
        raise ConfigError(
            f"{', '.join(networks.metrics)}: samples of {tuple(images.shape[1:])} are no pictures; "
            f"if they are latents, give `decode` where the float model is run"
        )
    return None


def _of_pictures(
    prompts: Sequence[str], shown: tuple[Tensor, Tensor] | None, networks: Networks
) -> dict[str, float]:
    """Metrics of pictures, also by the networks that are there."""
    if shown is None:
        return {}
    expected, pictures = shown
    metrics = {"psnr": psnr(expected, pictures), "ssim": ssim(expected, pictures)}
    if "inception_distance" in networks.metrics and len(pictures) >= SMALLEST_SET:
        features = tuple(networks.inception_features(images) for images in (expected, pictures))
        metrics["inception_distance"] = frechet_distance(*features)
        metrics["inception_kernel_distance"] = kernel_distance(*features)
    if "lpips" in networks.metrics:
        metrics["lpips"] = networks.perceptual_distance(expected, pictures)
    if "clip_score" in networks.metrics:
        metrics["clip_score"] = networks.clip_score(pictures, prompts)
        metrics["reference_clip_score"] = networks.clip_score(expected, prompts)
    return metrics


def evaluate_denoiser(
    reference: Denoiser,
    quantized: Denoiser,
    scheduler: Any,
    classifier: FeatureClassifier,
    *,
    sample_shape: tuple[Count, ...] = (1, 16, 16),
    num_classes: Count = 10,
    num_samples: Count = 256,
    num_inference_steps: Count | None = None,
    batch_size: Count = 32,
    seed: Seed = EVALUATION_SEED,
    decode: Decode | None = None,
) -> EvaluationResult:
    """Measure a quantized class-conditional denoiser against the float one.

    Args:
        reference: the float model.
        quantized: the quantized model, called like the float one.
        scheduler: the diffusers scheduler of both, or a `Sampler`; as of `run_reference`.
        classifier: judge of classes and space of features.
        sample_shape: shape of one sample.
        num_classes: classes that take turns.
        num_samples: final samples from each model.
        num_inference_steps: steps of the schedule, by default 20; a sampler has its own.
        batch_size: rows in a call.
        seed: must differ from the calibration's.
        decode: makes pictures of samples that are latents, as of `ReferenceRun`.

    Returns:
        The numbers. To measure many models, use `run_reference` once and `evaluate_against`.
    """
    run = run_reference(
        reference,
        scheduler,
        sample_shape=sample_shape,
        num_classes=num_classes,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        decode=decode,
    )
    return evaluate_against(run, quantized, scheduler, classifier)


def _sqnr_of_batches(reference: Iterable[Tensor], test: Iterable[Tensor]) -> float:
    expected, actual = ([part.flatten() for part in parts] for parts in (reference, test))
    if not expected:
        raise CalibrationError("epsilon_sqnr got no batch of inputs; give at least one")
    return sqnr_db(torch.cat(expected), torch.cat(actual))
