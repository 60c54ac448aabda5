"""One tiny pipeline of every kind: how it is made, exported, and drawn with by both sides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny_pipelines
import tiny_transformers
import torch
from test_runner_loop import diffusers_image
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """How a kind differs from the others.

    Attributes:
        side: Of its pictures, where both sides have to be told; None for what the pipeline draws.
        options: What diffusers' pipeline has to be told, to draw as is documented.
        numbers: What both sides are told.
        heard: Whether it makes sounds.
    """

    side: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    heard: bool = False


_AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}

KINDS: Mapping[str, Kind] = {
    "stable_diffusion": Kind(),
    "stable_diffusion_xl": Kind(),
    "inpainting": Kind(),
    "ddpm": Kind(),
    "ddim": Kind(),
    "latent_diffusion": Kind(),
    "latent_consistency": Kind(),
    "image_to_image": Kind(),
    "image_to_image_xl": Kind(numbers={"strength": 0.8}),  # 0.3 of three steps is none
    "instruct_pix2pix": Kind(),
    "controlnet": Kind(),
    "pixart_sigma": Kind(options={**_AS_ASKED, "height": 16, "width": 16}),
    "stable_diffusion_3": Kind(),
    "sana": Kind(side=32, options=_AS_ASKED),
    "flux": Kind(side=16),
    "z_image": Kind(side=16),
    "shallow_flux_2_klein": Kind(side=16),
    "stable_audio": Kind(heard=True),
}


def pipeline_of(kind: str, folder: Path) -> Any:
    """The pipeline, of random weights; what it needs of files is in the folder."""
    module = tiny_pipelines if hasattr(tiny_pipelines, kind) else tiny_transformers
    return getattr(module, kind)(folder)


def options_of(kind: str) -> dict[str, Any]:
    """What `export_pipeline` is told of the kind."""
    side = KINDS[kind].side
    return {} if side is None else {"sizes": [(side, side)]}


def drawn_twice(kind: str, pipeline: Any, runner: Any) -> tuple[Tensor, Tensor]:
    """What diffusers' pipeline draws, and what the exported folder does, from one noise."""
    prompt = [] if runner.manifest["kind"] == "unconditional" else ["a cat"]
    guided = {"guidance_scale": 3.0} if prompt else {}
    asked, side, numbers = KINDS[kind].options, KINDS[kind].side, KINDS[kind].numbers
    size = {} if side is None else {"height": side, "width": side}
    ours, theirs = pixels(runner)
    drawn = diffusers_sound if KINDS[kind].heard else diffusers_image
    expected = drawn(
        pipeline, *prompt, num_inference_steps=3, **guided, **size, **asked, **numbers, **theirs
    )
    return torch.from_numpy(expected), torch.from_numpy(runner.sample(*prompt, **numbers, **ours))


def diffusers_sound(pipeline: Any, *arguments: Any, seed: int = 0, **options: Any) -> Any:
    """What the pipeline makes, float [samples, channels]."""
    generator = torch.Generator().manual_seed(seed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(*arguments, generator=generator, output_type="np", **options).audios[0].T


def pixels(runner: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs of the runner and of the pipeline that are neither prompt nor numbers."""
    needs = runner.loop.needs
    if "image" not in needs:
        return {}, {}
    from PIL import Image

    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    if "mask" not in needs:
        return {"image": image}, {"image": Image.fromarray(image)}
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:14] = 255
    pictures = {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask)}
    return {"image": image, "mask": mask}, {**pictures, "height": 16, "width": 16}
