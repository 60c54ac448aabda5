"""Samples that several denoisers draw from the same noise, as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpqdm_fx.ambient import plain_torch
from mpqdm_fx.denoisers import Denoiser, draw
from mpqdm_fx.errors import MPQError
from mpqdm_fx.folders import MODEL_CONFIG
from mpqdm_fx.models.model_config import read_model_config
from mpqdm_fx.models.sources import Source
from mpqdm_fx.models.weight_files import load_weights

__all__ = ["Drawn", "draw_pictures"]

_IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What several denoisers drew from the same noise.

    Attributes:
        samples: Samples [N, *sample_shape] by denoiser.
        images: The same as pictures [N, 1 or 3, H, W], about -1 to 1; empty if they are none.
        labels: What each sample was to show; empty if nothing is said.
        note: What the pictures are, where they are not the model's own output.
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
    seed: int = 0,
    subfolder: str | None = None,
) -> Drawn:
    """Draw with each denoiser from the same noise and conditions.

    Latents are decoded by the VAE of the pipeline that the model came from, where there is one;
    else their first channel is shown, in grey, all on one scale.

    Args:
        source: Shapes, scheduler and conditions.
        denoisers: By name; the first one gives the scale of latents.
        num: Samples of each.
        steps: Steps of the scheduler.
        seed: Seed of the noise.
        subfolder: Part of a pipeline folder that the source came from.
    """
    samples = {
        name: draw(source, denoiser, num=num, steps=steps, seed=seed)
        for name, denoiser in denoisers.items()
    }
    labels, said = _labels(source, num, seed)
    images, note = _images(source, samples, subfolder)
    return Drawn(
        samples=samples,
        images=images,
        labels=labels,
        note=" ".join(part for part in (note, said) if part),
        steps=steps,
        seed=seed,
    )


def _labels(source: Source, num: int, seed: int) -> tuple[tuple[str, ...], str]:
    """What samples are asked to show, and what is to be said of it."""
    if source.inputs is None or source.extra is not None:
        return (), ""
    conditions = source.conditions(num, seed)
    classes = conditions.get("class_labels")
    if isinstance(classes, Tensor) and classes.ndim == 1 and not classes.is_floating_point():
        return tuple(f"class {int(label)}" for label in classes), ""
    if isinstance(conditions.get("encoder_hidden_states"), Tensor):
        return (), "They are conditioned on seeded random embeddings, not on prompts."
    return (), ""


def _images(
    source: Source, samples: Mapping[str, Tensor], subfolder: str | None
) -> tuple[dict[str, Tensor], str]:
    first = next(iter(samples.values()))
    if first.ndim != 4:
        return {}, f"Samples of shape {tuple(first.shape[1:])} are no pictures."
    if first.shape[1] in _IMAGE_CHANNELS:
        return dict(samples), ""
    why = "the model did not come from a pipeline with one"
    folder = Path(source.name) / "vae"
    if subfolder is not None and (folder / MODEL_CONFIG).is_file():
        try:
            return _decoded(folder, samples, source.variant), ""
        except (MPQError, RuntimeError, AttributeError) as error:
            why = f"the pipeline's cannot decode them ({error})"
    scale = first[:, :1].abs().max().clamp_min(1e-6)
    grey = {name: value[:, :1] / scale for name, value in samples.items()}
    return grey, f"These are latents, first channel, not decoded by a VAE: {why}."


@plain_torch()
@torch.no_grad()
def _decoded(
    folder: Path, samples: Mapping[str, Tensor], variant: str | None
) -> dict[str, Tensor]:
    """Latents through a pipeline's VAE, as its pipelines do it."""
    found, config = read_model_config(folder)
    vae = load_weights(found, config, folder, variant)
    scaling, shift = config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0

    def decode(latents: Tensor) -> Tensor:
        parts = [vae.decode(row[None] / scaling + shift).sample for row in latents]  # type: ignore[operator]
        images: Tensor = torch.cat(parts)
        return images

    return {name: decode(value) for name, value in samples.items()}
