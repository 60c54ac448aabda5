"""What training measures of a digits model: accuracy of its samples, and memorisation."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.digits.classifier import accuracy
from mpqdm_fx.digits.dataset import IMAGE_SIZE, NUM_CLASSES, DigitsSplit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Mean distance to the nearest training image, in pixels' L2 norm over 256 pixels.

    Both are taken over all nine one-pixel shifts of the training images, which the model saw. A
    model that copies its training data has samples much nearer to it than new digits are.

    Attributes:
        samples: mean over the samples.
        held_out: mean over the held-out digits.
        ratio: samples / held_out; near 1 or above is what one wants, near 0 is copying.
        nearest_sample: the smallest distance of any sample.
        nearest_held_out: the smallest distance of any held-out digit.
    """

    samples: float
    held_out: float
    ratio: float
    nearest_sample: float
    nearest_held_out: float


def balanced_labels(count: int) -> Tensor:
    """Return labels 0, 1, ..., 9, 0, 1, ... as int64 [count]."""
    return torch.arange(count) % NUM_CLASSES


def draw_samples(
    model: nn.Module, scheduler: Any, *, count: int, seed: int, num_inference_steps: int = 20
) -> Tensor:
    """Draw digits with balanced labels, `balanced_labels(count)`.

    Returns:
        float32 [count, 1, 16, 16], about in [-1, 1].
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    labels = balanced_labels(count)
    batches = [
        denoise(
            model,
            scheduler,
            noise[start : start + 64],
            num_inference_steps=num_inference_steps,
            seed=seed,
            conditions={"class_labels": labels[start : start + 64]},
        )
        for start in range(0, count, 64)
    ]
    return torch.cat(batches)


def sample_accuracies(
    model: nn.Module,
    scheduler: Any,
    classifier: nn.Module,
    *,
    seeds: tuple[int, ...],
    count: int = 256,
    num_inference_steps: int = 20,
) -> tuple[float, ...]:
    """Return, for each noise seed, the share of samples classified as the class asked for."""
    return tuple(
        accuracy(
            classifier,
            draw_samples(
                model, scheduler, count=count, seed=seed, num_inference_steps=num_inference_steps
            ),
            balanced_labels(count),
        )
        for seed in seeds
    )


def measure_memorisation(samples: Tensor, split: DigitsSplit) -> Memorisation:
    """Compare how near samples and held-out digits are to the training images.

    Args:
        samples: float [N, 1, 16, 16] in [-1, 1].
        split: the digits that the model was trained on.

    Returns:
        The distances.
    """
    padded = functional.pad(split.train_images, (1, 1, 1, 1), value=-1.0)
    training = torch.cat(
        [
            padded[:, :, down : down + IMAGE_SIZE, right : right + IMAGE_SIZE].flatten(1)
            for down in range(3)
            for right in range(3)
        ]
    )
    sampled = torch.cdist(samples.flatten(1), training).amin(1)
    held_out = torch.cdist(split.held_out_images.flatten(1), training).amin(1)
    return Memorisation(
        samples=float(sampled.mean()),
        held_out=float(held_out.mean()),
        ratio=float(sampled.mean() / held_out.mean()),
        nearest_sample=float(sampled.min()),
        nearest_held_out=float(held_out.min()),
    )
