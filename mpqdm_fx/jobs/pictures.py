"""Samples that several denoisers draw from the same noise, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mpqdm_fx.report.reference_run import EVALUATION_SEED
from mpqdm_fx.sources.denoisers import Denoiser, as_pictures, draw
from mpqdm_fx.sources.source import Source

__all__ = ["Drawn", "draw_pictures"]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What several denoisers drew from the same noise.

    Attributes:
        samples: Samples [N, *sample_shape] by denoiser.
        images: The same as pictures [N, 1 or 3, H, W], about -1 to 1; empty if they are none.
        labels: What each sample was to show; empty if nothing is said.
        note: What the pictures are, where they are not the model's own output, or why there are
            none.
        steps: Steps of the scheduler.
        seed: Seed of the noise.
    """

    samples: Mapping[str, Tensor]
    images: Mapping[str, Tensor]
    labels: tuple[str, ...]
    note: str
    steps: int
    seed: int


def draw_pictures(
    source: Source,
    denoisers: Mapping[str, Denoiser],
    *,
    num: int,
    steps: int,
    seed: int = EVALUATION_SEED,
) -> Drawn:
    """Draw with each denoiser from the same noise and conditions.

    Latents are decoded by the VAE of the pipeline that the model came from, where there is one;
    else their first channel is shown, in grey, all on one scale.

    Args:
        source: Shapes, scheduler and conditions.
        denoisers: By name; the first one gives the scale of latents.
        num: Samples of each.
        steps: Steps of the scheduler.
        seed: Seed of the noise; by default none that calibration runs start from.
    """
    samples = {
        name: draw(source, denoiser, num=num, steps=steps, seed=seed)
        for name, denoiser in denoisers.items()
    }
    images, note = _images(source, samples)
    return Drawn(
        samples=samples,
        images=images,
        labels=_labels(source, num, seed),
        note=note,
        steps=steps,
        seed=seed,
    )


def _labels(source: Source, num: int, seed: int) -> tuple[str, ...]:
    """What samples are asked to show; empty if nothing that can be told."""
    if prompts := source.prompts(num):
        return prompts
    if source.inputs is None or source.extra is not None:
        return ()
    classes = source.conditions(num, seed).get("class_labels")
    if isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point():
        return tuple(f"class {int(label)}" for label in classes)
    return ()


def _images(source: Source, samples: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Pictures of samples, and what is to be said of them."""
    first = next(iter(samples.values()))
    if first.ndim != 4:
        return {}, f"samples of shape {tuple(first.shape[1:])} are no pictures"
    images, note = as_pictures(list(samples.values()), source)
    return dict(zip(samples, images, strict=True)), note
