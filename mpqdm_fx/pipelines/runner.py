"""Draw images with the programs of a folder that `mpqdm-fx export` wrote.

This file is copied into that folder as `run.py` and needs no other file of the package: numpy,
ExecuTorch's runtime, the scheduler (diffusers, with torch) and the tokenizer (transformers).

    python run.py "a cat" --seed 0 --steps 20 --guidance 7.5 --output cat.png
"""

import argparse
import copy
import hashlib
import importlib
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

__all__ = ["MANIFEST", "PipelineRunner", "RunnerError", "guidance_embedding", "main", "time_ids"]

logger = logging.getLogger(__name__)

MANIFEST = "pipeline.json"
_VERSION = 1


class RunnerError(ValueError):
    """The folder or what was asked for cannot be used; says why."""


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
        verify: Compare every file's checksum with the manifest's.

    Raises:
        RunnerError: The folder is not whole, or written by a newer version.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder, verify)
        self._programs: dict[str, Any] = {}
        self._methods: dict[tuple[str, str], Any] = {}
        self._tokenizers: dict[str, Any] = {}

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
            RunnerError: There is no program for the size, or a condition is missing or too much.
        """
        defaults = self.manifest["defaults"]
        steps = defaults["steps"] if steps is None else steps
        guidance = defaults["guidance"] if guidance is None else guidance
        size = self._size(height, width)
        self._check_conditions(prompt, image, mask)
        if steps < 1:
            raise RunnerError(f"steps is {steps}; give at least 1")
        runs = self._conditions(prompt, negative, guidance, size)
        generator = torch.Generator().manual_seed(seed)
        scheduler = self.scheduler(scheduler)
        scheduler.set_timesteps(steps)
        spec = self.manifest["latents"]
        shape = (1, spec["channels"], *(side // spec["scale"] for side in size))
        latents = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
        extra = self._masked(image, mask, size, generator)
        accepted = inspect.signature(scheduler.step).parameters
        options = {"generator": generator} if "generator" in accepted else {}
        for index, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, timestep)
            call = {
                "sample": torch.cat([scaled, *extra], dim=1),
                "timestep": timestep.float().reshape(1),
            }
            noise, *plain = (self._run("denoiser", size, {**call, **run})[0] for run in runs)
            if plain:
                noise = plain[0] + guidance * (noise - plain[0])
            latents = scheduler.step(noise, timestep, latents, return_dict=False, **options)[0]
            if callback is not None:
                callback(index + 1, len(scheduler.timesteps))
        picture = latents
        if self._has("vae_decoder"):
            picture = self._run("vae_decoder", size, {"latents": latents})[0]
        result: NDArray[np.float32] = (picture / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        return result

    def scheduler(self, chosen: Any = None) -> Any:
        """The folder's scheduler, or another one with its settings.

        Args:
            chosen: Class name of a diffusers scheduler; a scheduler is copied.

        Raises:
            RunnerError: diffusers has no such class.
        """
        if chosen is not None and not isinstance(chosen, str):
            return copy.deepcopy(chosen)
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        name = chosen or config["_class_name"]
        found = getattr(importlib.import_module("diffusers"), name, None)
        if found is None or not hasattr(found, "from_config"):
            raise RunnerError(f"diffusers has no scheduler {name!r}")
        return found.from_config(config)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.sizes[0]
        size = (height or default[0], width or default[1])
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
            wanted = "takes no prompt" if kind == "unconditional" else "needs a prompt"
            raise RunnerError(f"this {self.manifest['pipeline']} {wanted}")
        given = (image is not None, mask is not None)
        if given != (kind == "inpainting",) * 2:
            wanted = "needs" if kind == "inpainting" else "takes no"
            raise RunnerError(f"this {self.manifest['pipeline']} {wanted} image and mask")

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

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for part in ("text_encoder", "text_encoder_2"):
            if self._has(part):
                names = self._entry(part, None)["outputs"]
                values = self._run(part, None, {"input_ids": self._tokens(part, prompt)})
                for name, value in zip(names, values, strict=True):
                    found.setdefault(name["name"], []).append(value)
        named = {name: torch.cat(values, dim=-1) for name, values in found.items()}
        if "text_embeds" in named:
            named["added_cond_kwargs.text_embeds"] = named.pop("text_embeds")
        return named

    def _tokens(self, part: str, prompt: str) -> Tensor:
        name = part.replace("text_encoder", "tokenizer")
        if name not in self._tokenizers:
            loader = importlib.import_module("transformers").AutoTokenizer
            folder = self.folder / name
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
        mean, std = self._run("vae_encoder", size, {"image": pixels * (area < 0.5)})
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return [functional.interpolate(area, size=mean.shape[-2:]), latents]

    def _has(self, part: str) -> bool:
        return part in self.manifest["parts"]

    def _entry(self, part: str, size: tuple[int, int] | None) -> Any:
        for entry in self.manifest["methods"]:
            if entry["part"] == part and entry["size"] == (list(size) if size else None):
                return entry
        raise RunnerError(f"{self.folder / MANIFEST} names no method of {part} for {size}")

    def _run(
        self, part: str, size: tuple[int, int] | None, inputs: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Run one method on inputs by name."""
        entry = self._entry(part, size)
        values = []
        for spec in entry["inputs"]:
            value = inputs[spec["name"]].to(getattr(torch, spec["dtype"])).contiguous()
            if list(value.shape) != list(spec["shape"]):
                raise RunnerError(
                    f"{part}: {spec['name']} has shape {list(value.shape)}, its program takes "
                    f"{spec['shape']}"
                )
            values.append(value)
        return list(self._load(entry).execute(values))

    def _load(self, entry: Mapping[str, Any]) -> Any:
        key = (entry["file"], entry["method"])
        if key not in self._methods:
            from executorch.runtime import Runtime, Verification

            if key[0] not in self._programs:
                self._programs[key[0]] = Runtime.get().load_program(
                    self.folder / key[0], verification=Verification.Minimal
                )
            self._methods[key] = self._programs[key[0]].load_method(key[1])
        return self._methods[key]


def _read_manifest(folder: Path, verify: bool) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunnerError(f"{folder} was not written by mpqdm-fx export: {error}") from None
    except ValueError as error:
        raise RunnerError(f"{path} is damaged: {error}") from None
    if manifest.get("version", _VERSION + 1) > _VERSION:
        raise RunnerError(f"{path} was written by a newer version of mpqdm-fx")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise RunnerError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise RunnerError(
                f"{file} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            )
        if verify and _sha256(file) != expected["sha256"]:
            raise RunnerError(f"{file} is damaged: its checksum differs from the manifest's")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unit(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    """Numbers in 0..1 of an array, of bytes or already in that range."""
    array = np.asarray(value)
    if array.shape != shape:
        raise RunnerError(f"{name} has shape {array.shape}, the program takes {shape}")
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return torch.from_numpy(array.astype(np.float32) / np.float32(scale))


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
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    from PIL import Image

    output, folder = given.pop("output"), given.pop("folder")
    try:
        runner = PipelineRunner(folder)
        if given["image"] is not None and given["mask"] is not None:
            height, width = runner._size(given["height"], given["width"])
            for name, mode in (("image", "RGB"), ("mask", "L")):
                picture = Image.open(given[name]).convert(mode).resize((width, height))
                given[name] = np.asarray(picture)
        pixels = runner(
            given.pop("prompt"),
            **given,
            callback=lambda step, count: logger.info("step %d of %d", step, count),
        )
    except RunnerError as error:
        logger.error("error: %s", error)
        return 2
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(output)
    logger.info("written to %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
