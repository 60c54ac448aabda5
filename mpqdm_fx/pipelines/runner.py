"""Draw images with the programs of a folder that `mpqdm-fx export` wrote.

This file is copied into that folder as `run.py`, with what it imports of the package beside it.
They need numpy, ExecuTorch's runtime, the scheduler (diffusers, with torch), the tokenizer
(transformers) and, for picture files, pillow.

    python run.py "a cat" --seed 0 --steps 20 --guidance 7.5 --output cat.png
"""

import argparse
import copy
import importlib
import inspect
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.errors import ArtifactError, first_line
from mpqdm_fx.io.classes import diffusers_class
from mpqdm_fx.pipelines.picture_files import check_output, read_picture, write_picture
from mpqdm_fx.pipelines.program_files import (
    LARGEST,
    SCHEDULER,
    ProgramFiles,
    RunnerError,
    refusals,
)

__all__ = ["PipelineRunner", "RunnerError", "guidance_embedding", "main", "time_ids"]

logger = logging.getLogger(__name__)


def time_ids(height: int, width: int) -> Tensor:
    """Stable Diffusion XL's size conditions: original size, crop at the corner, target size.

    Returns:
        float32 [1, 6].
    """
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """What a model with distilled guidance gets instead of a second call (LCM).

    The sinusoidal embedding of `1000 (guidance - 1)`, sines first, as diffusers computes it.

    Returns:
        float32 [1, width].
    """
    half = width // 2
    step = np.log(np.float32(10000.0)) / np.float32(half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -float(step))
    angles = torch.tensor([[(guidance - 1) * 1000.0]], dtype=torch.float32) * frequencies
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class PipelineRunner:
    """A folder of programs, callable with a prompt.

    Programs are loaded when they are first run.

    Args:
        folder: Folder written by `mpqdm-fx export`.
        verify: Hash all files at once; otherwise each is hashed before it is used.

    Raises:
        ArtifactError: The folder is not whole, or written by another version.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.programs = ProgramFiles(folder, verify=verify)
        self._tokenizers: dict[str, Any] = {}

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `pipeline.json`."""
        return self.programs.manifest

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Heights and widths that there are programs for; the first is the default."""
        return [(height, width) for height, width in self.manifest["sizes"]]

    def __call__(self, prompt: str | None = None, **options: Any) -> NDArray[np.uint8]:
        """Draw one image.

        Args:
            prompt: What to draw; None for an unconditional model.
            **options: As of `sample`.

        Returns:
            uint8 [H, W, 3], or [H, W, 1] for a model of grey images.

        Raises:
            RunnerError: As `sample`.
        """
        return (self.sample(prompt, **options) * 255).round().astype(np.uint8)

    def sample(
        self,
        prompt: str | None = None,
        *,
        negative: str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        mask: Any = None,
        scheduler: Any = None,
        callback: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Draw one image as float numbers.

        Args:
            prompt: What to draw; None for an unconditional model.
            negative: What not to draw; used with guidance.
            seed: Seed of the noise; the same numbers as diffusers with a CPU generator.
            steps: Steps of the scheduler; default: those of the export.
            guidance: Weight of classifier-free guidance; up to 1 switches it off, and halves the
                work. Default: that of the export.
            height: Height in pixels; height and width must be a size of the export.
            width: Width in pixels.
            image: For inpainting: uint8 [H, W, 3] or float in 0..1.
            mask: For inpainting: [H, W], nonzero (uint8: from 128) where to draw.
            scheduler: Class name of a diffusers scheduler, or a scheduler, in place of the
                folder's own.
            callback: Told the step's number and their count after each step.

        Returns:
            float32 [H, W, channels] in 0..1.

        Raises:
            RunnerError: There is no program for the size, no row for a timestep, a condition is
                missing or too much, a number is out of range, the scheduler cannot draw, or a
                package is not installed.
            ArtifactError: A file of the folder is not what was written.
        """
        defaults = self.manifest["defaults"]
        steps = defaults["steps"] if steps is None else steps
        guidance = defaults["guidance"] if guidance is None else guidance
        size = self._size(height, width)
        self._check_conditions(prompt, image, mask)
        _check_numbers(steps, guidance, seed)
        generator = torch.Generator().manual_seed(seed)
        scheduler = self.scheduler(scheduler)
        named = type(scheduler).__name__
        with refusals(f"{named} has no schedule of {steps} steps"):
            scheduler.set_timesteps(steps)
            times = self._times(scheduler.timesteps)
        if not hasattr(scheduler, "init_noise_sigma"):
            raise RunnerError(
                f"{named} has no init_noise_sigma: schedulers of flow matching are not supported; "
                f"give one of noise or v-prediction, such as DDIMScheduler"
            )
        runs = [self._once(run) for run in self._conditions(prompt, negative, guidance, size)]
        spec = self.manifest["latents"]
        shape = (1, spec["channels"], *(side // spec["scale"] for side in size))
        latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        extra = self._masked(image, mask, size, generator)
        drawing = f"{named} cannot draw with this folder"
        with refusals(drawing):
            accepted = inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        for index, timestep in enumerate(scheduler.timesteps):
            with refusals(drawing):
                scaled = scheduler.scale_model_input(latents, timestep)
            call = {"sample": torch.cat([scaled, *extra], dim=1), "timestep": times[index]}
            noise, *plain = (
                self.programs.run("denoiser", size, {**call, **run})["noise_pred"] for run in runs
            )
            if plain:
                noise = plain[0] + guidance * (noise - plain[0])
            with refusals(drawing):
                latents = scheduler.step(noise, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                callback(index + 1, len(scheduler.timesteps))
        return self._decoded(latents, size)

    def _decoded(self, latents: Tensor, size: tuple[int, int]) -> NDArray[np.float32]:
        """What the scheduler ended with as a picture."""
        picture = latents
        if "vae_decoder" in self.manifest["parts"]:
            picture = self.programs.run("vae_decoder", size, {"latents": latents})["image"]
        if bool(picture.isnan().any()):
            raise RunnerError("the image is not a number (NaN); use less guidance or more steps")
        result: NDArray[np.float32] = (picture / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        return result

    def scheduler(self, chosen: Any = None) -> Any:
        """The folder's scheduler, or another one with its settings.

        Args:
            chosen: Class name of a diffusers scheduler; a scheduler is copied.

        Raises:
            RunnerError: diffusers has no such class, or it refuses the settings.
        """
        if chosen is not None and not isinstance(chosen, str):
            return copy.deepcopy(chosen)
        config = self.programs.files.read_json(SCHEDULER, finite=False)
        is_own = chosen is None
        with refusals("the scheduler cannot be made"):
            try:
                scheduler_class = diffusers_class(
                    "scheduler",
                    config.get("_class_name") if is_own else chosen,
                    str(self.folder / SCHEDULER) if is_own else "",
                )
            except ArtifactError as error:
                raise RunnerError(str(error)) from None
            return scheduler_class.from_config(config)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.sizes[0]
        size = (default[0] if height is None else height, default[1] if width is None else width)
        if size not in self.sizes:
            known = ", ".join(f"{h}x{w}" for h, w in self.sizes)
            raise RunnerError(
                f"there is no program for {size[0]}x{size[1]} pixels; sizes of this folder: "
                f"{known}; export it with that size"
            )
        return size

    def _check_conditions(self, prompt: str | None, image: Any, mask: Any) -> None:
        kind = self.manifest["kind"]
        if (prompt is None) != (kind == "unconditional"):
            rule = "takes no prompt" if kind == "unconditional" else "needs a prompt"
            raise RunnerError(f"this {self.manifest['pipeline']} {rule}")
        present = (image is not None, mask is not None)
        if present != (kind == "inpainting",) * 2:
            rule = "needs" if kind == "inpainting" else "takes no"
            raise RunnerError(f"this {self.manifest['pipeline']} {rule} image and mask")

    def _conditions(
        self, prompt: str | None, negative: str | None, guidance: float, size: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Inputs of the denoiser's calls of one step: with the prompt, and without it if guided."""
        if prompt is None:
            return [{}]
        settings = self.manifest["settings"]
        width = settings["time_cond_proj_dim"]
        runs = [self._encode(prompt)]
        if guidance > 1 and width is None:
            zeros = negative is None and settings["force_zeros_for_empty_prompt"]
            runs.append(
                {name: torch.zeros_like(value) for name, value in runs[0].items()}
                if zeros
                else self._encode(negative or "")
            )
        more = {}
        if settings["time_ids"]:
            more["added_cond_kwargs.time_ids"] = time_ids(*size)
        if width is not None:
            more["timestep_cond"] = guidance_embedding(guidance, width)
        return [{**run, **more} for run in runs]

    def _once(self, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add what the denoiser computes once per image: keys and values of the prompt."""
        if not self.programs.has("denoiser"):
            return conditions
        return {**conditions, **self.programs.run("denoiser", None, conditions)}

    def _times(self, timesteps: Tensor) -> list[Tensor]:
        """What the denoiser is told of each step: the timestep, or its row in the tables."""
        table = self.manifest.get("timesteps")
        if table is None:
            return [timestep.float().reshape(1) for timestep in timesteps]
        rows = {value: row for row, value in enumerate(table)}
        missing = [value for value in timesteps.float().tolist() if value not in rows]
        if missing:
            raise RunnerError(
                f"timestep {missing[0]:g} is not in this folder's tables, which have "
                f"{len(rows)} timesteps from {table[0]:g} to {table[-1]:g}; draw with "
                f"{self.manifest['defaults']['steps']} steps of the folder's own scheduler, or "
                f"export without tables"
            )
        return [torch.tensor([rows[value]]) for value in timesteps.float().tolist()]

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        embeddings: dict[str, list[Tensor]] = {}
        for part in ("text_encoder", "text_encoder_2"):
            if self.programs.has(part):
                outputs = self.programs.run(part, None, {"input_ids": self._tokens(part, prompt)})
                for name, value in outputs.items():
                    embeddings.setdefault(name, []).append(value)
        named = {name: torch.cat(values, dim=-1) for name, values in embeddings.items()}
        if "text_embeds" in named:
            named["added_cond_kwargs.text_embeds"] = named.pop("text_embeds")
        return named

    def _tokens(self, part: str, prompt: str) -> Tensor:
        name = part.replace("text_encoder", "tokenizer")
        with refusals(f"the {name} cannot read the prompt"):
            if name not in self._tokenizers:
                loader = importlib.import_module("transformers").AutoTokenizer
                folder = self.programs.checked_folder(name)
                self._tokenizers[name] = loader.from_pretrained(folder, local_files_only=True)
            tokenizer = self._tokenizers[name]
            ids: Tensor = tokenizer(
                [prompt],
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return ids

    def _masked(
        self, image: Any, mask: Any, size: tuple[int, int], generator: torch.Generator
    ) -> list[Tensor]:
        """Mask and masked image's latents for the denoiser of an inpainting pipeline."""
        if image is None:
            return []
        pixels = _unit(image, (*size, 3), "image").permute(2, 0, 1)[None] * 2 - 1
        area = (_unit(mask, size, "mask") >= 0.5).float()[None, None]
        encoded = self.programs.run("vae_encoder", size, {"image": pixels * (area < 0.5)})
        mean, std = encoded["mean"], encoded["std"]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return [functional.interpolate(area, size=mean.shape[-2:]), latents]


def _unit(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Numbers in 0..1 of an array, of bytes or already in that range."""
    array = np.asarray(value)
    if array.shape != shape:
        raise RunnerError(f"{name} has shape {array.shape}, the program takes {shape}")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return torch.from_numpy(array.astype(np.float32) / np.float32(scale))


def _check_numbers(steps: int, guidance: float, seed: int) -> None:
    if not 1 <= steps <= LARGEST:
        raise RunnerError(f"steps is {steps}; give at least 1 and at most {LARGEST}")
    if not math.isfinite(guidance):
        raise RunnerError(f"guidance is {guidance}; give a finite number")
    if not -(2**63) <= seed < 2**64:
        raise RunnerError(f"seed is {seed}; give at least -2**63 and less than 2**64")


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw an image from the command line; an error is one line on stderr and exit status 2.

    Args:
        arguments: Words after the program's name; default: those that it was called with.
    """
    parser = argparse.ArgumentParser(description="Draw an image with the programs beside this file")
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--negative", help="what not to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float, help="up to 1: off")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--image", type=Path, help="picture to paint into")
    parser.add_argument("--mask", type=Path, help="white where to paint")
    parser.add_argument("--scheduler", help="class of diffusers in place of the folder's own")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--output", type=Path, default=Path("image.png"))
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    output, folder = options.pop("output"), options.pop("folder")
    try:
        check_output(output)
        runner = PipelineRunner(folder)
        if options["image"] is not None and options["mask"] is not None:
            size = runner._size(options["height"], options["width"])
            options["image"] = read_picture(options["image"], "RGB", size)
            options["mask"] = read_picture(options["mask"], "L", size)
        pixels = runner(
            options.pop("prompt"),
            **options,
            callback=lambda step, count: logger.info("step %d of %d", step, count),
        )
        write_picture(pixels, output)
    except ArtifactError as error:
        logger.error("error: %s", error)
        return 2
    except (OSError, RuntimeError) as error:
        logger.error("error: %s", first_line(error))
        return 2
    logger.info("written to %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
