"""What the float model does, once, so that many quantized models can be compared with it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import Denoiser, first_tensor, is_sampler
from mpqdm_fx.calibration.sampling import denoise_in_batches
from mpqdm_fx.calibration.trajectories import Trajectories, balanced_class_labels
from mpqdm_fx.capture.entry import in_float32
from mpqdm_fx.io.ambient import plain_torch
from mpqdm_fx.io.progress import tracked
from mpqdm_fx.records.validation import Count, Seed, checked

__all__ = [
    "EVALUATION_SEED",
    "Decode",
    "ReferenceRun",
    "outputs_of",
    "reference_run",
    "run_reference",
    "shows_pictures",
]

Decode = Callable[[Tensor], Tensor | None]
"""Makes pictures of samples."""

EVALUATION_SEED = 90_000
"""Default seed of evaluations, far from the small numbers that calibration uses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRun:
    """What the float model did, so that many quantized models can be compared with it.

    Attributes:
        inputs: Batches of keyword arguments from held-out trajectories.
        outputs: The float model's output for each batch, each [batch, ...].
        images: Its final samples [N, ...].
        runs: What they were drawn with: conditions of batch N, and guidance where there is some,
            keyword arguments of `denoise_in_batches`.
        num_inference_steps: Steps of the schedule; None with a `Sampler`.
        batch_size: Rows in a batch.
        seed: Of noise and trajectories; samples have the next one.
        decode: Makes pictures [N, 1 or 3, H, W] in about -1..1 of samples, or None of what is no
            picture; None shows samples themselves, where they look like pictures.
        prompts: What each sample was told; empty where it was told no text.
        convention: How the models are called by a scheduler's loop; None takes that of each one's
            class.
    """

    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Tensor, ...]
    images: Tensor
    runs: Mapping[str, Any]
    num_inference_steps: int | None
    batch_size: int
    seed: int
    decode: Decode | None = None
    prompts: tuple[str, ...] = ()
    convention: CallingConvention | None = None

    @functools.cached_property
    def pictures(self) -> Tensor | None:
        """`images` as pictures; None if they are none."""
        return self.as_pictures(self.images)

    def as_pictures(self, images: Tensor) -> Tensor | None:
        """Samples of any model as pictures; None if they are none, or smaller than a window.

        Args:
            images: [N, ...], what `draw` gave.
        """
        pictures = images if self.decode is None else self.decode(images)
        return (
            pictures if pictures is not None and shows_pictures(tuple(pictures.shape[1:])) else None
        )

    def draw(self, model: Denoiser, scheduler: Any) -> Tensor:
        """A quantized model's samples [N, ...], of the noise and conditions of `images`."""
        return _draw(
            model,
            scheduler,
            self.runs,
            len(self.images),
            sample_shape=tuple(self.images.shape[1:]),
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
            seed=self.seed + 1,
            convention=self.convention,
            progress="quantized samples",
        )


def shows_pictures(sample_shape: tuple[int, ...]) -> bool:
    """Whether a shape [C, H, W] is that of pictures of a window's size at least.

    Args:
        sample_shape: Of one sample.
    """
    return len(sample_shape) == 3 and sample_shape[0] in (1, 3) and min(sample_shape[1:]) >= 3


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
    decode: Decode | None = None,
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
        decode: makes pictures of samples that are latents, as of `ReferenceRun`.

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
    return reference_run(
        reference,
        scheduler,
        trajectories,
        {"conditions": {"class_labels": torch.arange(num_samples) % num_classes}},
        num_samples,
        sample_shape=sample_shape,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        decode=decode,
    )


def reference_run(
    reference: Denoiser,
    scheduler: Any,
    inputs: Iterable[Mapping[str, Any]],
    runs: Mapping[str, Any],
    num_samples: int,
    *,
    sample_shape: tuple[int, ...],
    num_inference_steps: int | None,
    batch_size: int,
    seed: int,
    decode: Decode | None = None,
    prompts: tuple[str, ...] = (),
    convention: CallingConvention | None = None,
) -> ReferenceRun:
    """Run the float model once, on inputs that are there and under conditions of any kind.

    Args:
        reference: The float model.
        scheduler: Its diffusers scheduler, or a `Sampler`.
        inputs: Batches of keyword arguments that calibration does not see.
        runs: How samples are drawn, as of `ReferenceRun`, for `num_samples`.
        num_samples: Final samples to draw.
        sample_shape: Shape of one sample.
        num_inference_steps: Steps of the schedule; None with a `Sampler`.
        batch_size: Rows in a batch.
        seed: Of the evaluation; the samples' noise has the next one.
        decode: As of `ReferenceRun`.
        prompts: What each sample is told, as of `ReferenceRun`.
        convention: As of `ReferenceRun`.
    """
    batches = tuple(inputs)
    shape, steps = sample_shape, num_inference_steps
    return ReferenceRun(
        inputs=batches,
        outputs=tuple(outputs_of(reference, batches, "float outputs")),
        images=_draw(
            reference, scheduler, runs, num_samples, sample_shape=shape,
            num_inference_steps=steps, batch_size=batch_size, seed=seed + 1,
            convention=convention, progress="float samples",
        ),
        runs=runs,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        decode=decode,
        prompts=prompts,
        convention=convention,
    )  # fmt: skip


@plain_torch()
@torch.no_grad()
def outputs_of(
    model: Denoiser, batches: Iterable[Mapping[str, Any]], progress: str | None = None
) -> list[Tensor]:
    """A model's output [batch, ...] for each batch of keyword arguments, computed in float32.

    Args:
        model: The model.
        batches: The arguments.
        progress: Name of the stage that tells of the batches; None tells of none.
    """
    model = in_float32(model)
    return [first_tensor(model(**batch)) for batch in tracked(batches, progress)]


def _draw(
    model: Denoiser,
    scheduler: Any,
    runs: Mapping[str, Any],
    count: int,
    *,
    sample_shape: tuple[int, ...],
    seed: int,
    num_inference_steps: int | None,
    batch_size: int,
    convention: CallingConvention | None,
    progress: str,
) -> Tensor:
    noise = torch.randn(count, *sample_shape, generator=torch.Generator().manual_seed(seed))
    return denoise_in_batches(
        model,
        scheduler,
        noise,
        num_inference_steps=num_inference_steps,
        seed=seed,
        batch_size=batch_size,
        convention=convention,
        progress=progress,
        **runs,
    )
