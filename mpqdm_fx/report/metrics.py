"""How far a quantized denoiser is from the float one: along the way, at the end, and by class.

Four numbers, because none is enough alone: `epsilon_sqnr` feeds both models the same inputs
(teacher forcing) and resolves small differences; `x0_sqnr` lets both run freely from the same
noise; the paired Frechet distance (Heusel et al. 2017, equation 6) compares the sets of samples in
a classifier's features; the accuracy says whether the samples still show their class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpqdm_fx.ambient import plain_torch
from mpqdm_fx.calibration.calls import check_calls
from mpqdm_fx.calibration.samplers import Denoiser, first_tensor, is_sampler
from mpqdm_fx.calibration.sampling import denoise_in_batches
from mpqdm_fx.calibration.trajectories import Trajectories, balanced_class_labels
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.entry import in_float32
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.validation import Count, Seed, checked

__all__ = [
    "EvaluationResult",
    "FeatureClassifier",
    "ReferenceRun",
    "class_accuracy",
    "epsilon_sqnr",
    "evaluate_against",
    "evaluate_denoiser",
    "frechet_distance",
    "run_reference",
    "x0_sqnr",
]

EVALUATION_SEED = 90_000
"""Default seed of evaluations, far from the small numbers that calibration uses."""


class FeatureClassifier(Protocol):
    """A classifier with a feature layer, such as `DigitsClassifier`."""

    def features(self, images: Tensor) -> Tensor:
        """Return features [N, D] of images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [N, classes] of images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """A quantized denoiser measured against the float one.

    Attributes:
        epsilon_sqnr: decibels, teacher-forced, on held-out trajectories; inf for identical outputs.
        x0_sqnr: decibels of the final samples from the same noise.
        frechet_distance: between both sets of samples, in the classifier's features; 0 is best.
        accuracy: share of the quantized model's samples that are classified as their class, 0..1.
        reference_accuracy: the same of the float model's samples.
        num_samples: samples drawn from each model.
        num_inference_steps: steps of the schedule; None with a `Sampler`.
        seed: of the evaluation.
    """

    epsilon_sqnr: float
    x0_sqnr: float
    frechet_distance: float
    accuracy: float
    reference_accuracy: float
    num_samples: int
    num_inference_steps: int | None
    seed: int

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Return the result for JSON; infinities become the strings "inf" and "-inf"."""
        return {
            name: str(value) if isinstance(value, float) and math.isinf(value) else value
            for name, value in dataclasses.asdict(self).items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """What the float model did, so that many quantized models can be compared with it.

    Attributes:
        inputs: batches of keyword arguments from held-out trajectories.
        outputs: the float model's output for each batch, each [batch, ...].
        images: its final samples [N, ...].
        labels: the classes asked for, int64 [N].
        num_inference_steps: steps of the schedule; None with a `Sampler`.
        batch_size: rows in a batch.
        seed: of noise and trajectories.
    """

    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Tensor, ...]
    images: Tensor
    labels: Tensor
    num_inference_steps: int | None
    batch_size: int
    seed: int


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
    return _sqnr_of_batches(_outputs(reference, batches), _outputs(quantized, batches))


def x0_sqnr(reference_images: Tensor, images: Tensor) -> float:
    """Compare final samples drawn from the same noise.

    Args:
        reference_images: of the float model, float [N, ...].
        images: of the other model from the same noise, same shape.

    Returns:
        Decibels; inf when identical.

    Raises:
        ConfigError: the shapes differ.
    """
    return sqnr_db(reference_images, images)


def frechet_distance(reference_features: Tensor, features: Tensor) -> float:
    """Return the Frechet distance of two sets of features, each taken as a Gaussian.

    `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))` (Heusel et al. 2017, equation 6), with
    torchmetrics, in float64. With few samples it is biased upwards; between sets drawn from the
    same noise it is a paired measure whose floor is zero.

    Args:
        reference_features: float [N, D], N at least 2.
        features: float [M, D], M at least 2.

    Returns:
        The distance, in squared units of the features; rounding below zero is clipped.

    Raises:
        ConfigError: torchmetrics is missing, or the shapes do not fit.
    """
    for name, given in (("reference_features", reference_features), ("features", features)):
        if given.ndim != 2 or len(given) < 2 or given.shape[1] != reference_features.shape[-1]:
            raise ConfigError(
                f"frechet_distance: {name} has shape {tuple(given.shape)}; both sets must be "
                "[at least 2, D] with one D"
            )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise _missing_torchmetrics() from error
    metric = FrechetInceptionDistance(
        feature=_PassFeatures(reference_features.shape[1]), normalize=True
    )
    metric.set_dtype(torch.float64)
    metric.update(reference_features.detach().double(), real=True)
    metric.update(features.detach().double(), real=False)
    return max(0.0, float(metric.compute()))


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose largest logit is at their label, with torchmetrics.

    Args:
        logits: float [N, classes].
        labels: int64 [N].

    Returns:
        A share in 0..1.

    Raises:
        ConfigError: torchmetrics is missing.
    """
    try:
        from torchmetrics.classification import MulticlassAccuracy
    except ImportError as error:
        raise _missing_torchmetrics() from error
    return float(MulticlassAccuracy(num_classes=logits.shape[1], average="micro")(logits, labels))


@checked
def run_reference(
    reference: Denoiser,
    scheduler: Any,
    *,
    sample_shape: tuple[Count, ...] = (1, 16, 16),
    num_classes: Count = 10,
    num_samples: Count = 256,
    num_inference_steps: Count | None = None,
    rows_per_timestep: Count = 12,
    batch_size: Count = 32,
    seed: Seed = EVALUATION_SEED,
) -> ReferenceRun:
    """Run the float model once: held-out trajectories, and samples with balanced classes.

    Args:
        reference: the float model; its keyword for labels is `class_labels`.
        scheduler: its diffusers scheduler, or a `Sampler`, whose conditions are `class_labels`.
        sample_shape: shape of one sample.
        num_classes: classes that take turns.
        num_samples: final samples to draw.
        num_inference_steps: steps of the schedule, by default 20; a sampler has its own.
        rows_per_timestep: held-out inputs at each timestep.
        batch_size: rows in a batch.
        seed: must differ from the calibration's: then noise and trajectories are held out.

    Returns:
        The run.
    """
    if num_inference_steps is None and not is_sampler(scheduler):
        num_inference_steps = 20
    trajectories = Trajectories(
        reference,
        scheduler,
        num_trajectories=max(rows_per_timestep, num_classes),
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        sample_shape=sample_shape,
        conditions=balanced_class_labels(num_classes),
        rows_per_timestep=rows_per_timestep,
    )
    inputs = tuple(trajectories)
    labels = torch.arange(num_samples) % num_classes
    return ReferenceRun(
        inputs=inputs,
        outputs=tuple(_outputs(reference, inputs)),
        images=_draw(
            reference,
            scheduler,
            labels,
            sample_shape=sample_shape,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            seed=seed + 1,
        ),
        labels=labels,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
    )


def evaluate_against(
    run: ReferenceRun, quantized: Denoiser, scheduler: Any, classifier: FeatureClassifier
) -> EvaluationResult:
    """Measure a quantized denoiser against a run of the float one.

    Args:
        run: from `run_reference`.
        quantized: called like the float model.
        scheduler: the scheduler that the run was made with.
        classifier: judge of classes and space of features.

    Returns:
        The four numbers.

    Raises:
        CalibrationError: the model returns no tensor.
        ConfigError: torchmetrics is missing.
    """
    images = _draw(
        quantized,
        scheduler,
        run.labels,
        sample_shape=tuple(run.images.shape[1:]),
        num_inference_steps=run.num_inference_steps,
        batch_size=run.batch_size,
        seed=run.seed + 1,
    )
    with torch.no_grad():
        return EvaluationResult(
            epsilon_sqnr=_sqnr_of_batches(run.outputs, _outputs(quantized, run.inputs)),
            x0_sqnr=x0_sqnr(run.images, images),
            frechet_distance=frechet_distance(
                classifier.features(run.images), classifier.features(images)
            ),
            accuracy=class_accuracy(classifier(images), run.labels),
            reference_accuracy=class_accuracy(classifier(run.images), run.labels),
            num_samples=len(run.labels),
            num_inference_steps=run.num_inference_steps,
            seed=run.seed,
        )


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

    Returns:
        The four numbers. To measure many models, use `run_reference` once and `evaluate_against`.
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
    )
    return evaluate_against(run, quantized, scheduler, classifier)


class _PassFeatures(nn.Identity):
    """torchmetrics' feature extractor for what are features already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size  # torchmetrics asks for it


def _draw(
    model: Denoiser,
    scheduler: Any,
    labels: Tensor,
    *,
    sample_shape: tuple[int, ...],
    seed: int,
    num_inference_steps: int | None,
    batch_size: int,
) -> Tensor:
    noise = torch.randn(len(labels), *sample_shape, generator=torch.Generator().manual_seed(seed))
    return denoise_in_batches(
        model,
        scheduler,
        noise,
        num_inference_steps=num_inference_steps,
        seed=seed,
        conditions={"class_labels": labels},
        batch_size=batch_size,
    )


@plain_torch()
@torch.no_grad()
def _outputs(model: Denoiser, batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    model = in_float32(model)
    return [first_tensor(model(**batch)) for batch in batches]


def _sqnr_of_batches(reference: Iterable[Tensor], test: Iterable[Tensor]) -> float:
    expected, found = ([part.flatten() for part in parts] for parts in (reference, test))
    if not expected:
        raise CalibrationError("epsilon_sqnr got no batch of inputs; give at least one")
    return sqnr_db(torch.cat(expected), torch.cat(found))


def _missing_torchmetrics() -> ConfigError:
    return ConfigError(
        'these metrics need torchmetrics; install it with: pip install "mpqdm-fx[report]"'
    )
