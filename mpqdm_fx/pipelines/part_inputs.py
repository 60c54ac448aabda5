"""What each part of a pipeline is called with: example inputs and calibration data.

The denoiser is calibrated on the float pipeline's own denoising runs, with its scheduler, prompts
and guidance; the decoder on what these runs end with; the text encoders on the prompts.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.calibration.sampling import EXTRA_CHANNELS
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.pipelines.conditions import Call, default_guidance, encode_prompts, with_numbers
from mpqdm_fx.pipelines.layout import Layout, Size, layout_of, open_pipeline
from mpqdm_fx.pipelines.runner import time_ids
from mpqdm_fx.records.validation import Count, NonNegative, Seed, check_fields
from mpqdm_fx.sources.extra_channels import random_masks

__all__ = ["DenoiserCalls", "PipelineInputs", "inputs_of"]


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """Calibration data of a pipeline's parts, made when it is asked for.

    Attributes:
        layout: The pipeline.
        size: Image size to calibrate at.
        prompts: Prompts; runs take turns with them.
        steps: Steps of each run.
        guidance: Guidance scale of the runs, as the pipeline takes it.
        trajectories: Runs.
        batch_size: Rows in a call.
        seed: Seed of noise and order.
    """

    layout: Layout
    size: Size
    prompts: Sequence[str]
    steps: Count
    guidance: NonNegative
    trajectories: Count
    batch_size: Count
    seed: Seed

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def guided(self) -> bool:
        """Whether a step calls the denoiser twice."""
        plain = self.layout.kind != "unconditional"
        return plain and self.guidance > 1 and self.layout.settings["time_cond_proj_dim"] is None

    @cached_property
    def runs(self) -> Trajectories:
        """The float pipeline's denoising runs."""
        layout = self.layout
        prompts = list(itertools.islice(itertools.cycle(self.prompts), self.trajectories))
        conditions = self._conditions(prompts if layout.kind != "unconditional" else [])
        plain, negative = conditions
        return Trajectories(
            layout.unet,
            layout.pipeline.scheduler,
            num_trajectories=self.trajectories,
            num_inference_steps=self.steps,
            batch_size=self.batch_size,
            seed=self.seed,
            sample_shape=layout.latent_shape(self.size),
            conditions=plain,
            guidance_scale=self.guidance if self.guided else None,
            unconditional=negative if self.guided else None,
            held_out=self.trajectories // 4,
        )

    def _conditions(self, prompts: list[str]) -> tuple[Call, Call]:
        """What the denoiser gets beside latents and timestep, with and without the prompts."""
        if not prompts:
            return {}, {}
        layout, count = self.layout, len(prompts)
        plain, negative = with_numbers(
            encode_prompts(layout.pipeline, prompts),
            size=self.size,
            guidance=self.guidance,
            guidance_width=layout.settings["time_cond_proj_dim"],
        )
        if layout.kind == "inpainting":
            masked = self._masked_latents(count)
            plain, negative = {**plain, **masked}, {**negative, **masked}
        return plain, negative

    @cached_property
    def _pictures(self) -> tuple[Tensor, Tensor]:
        """Smooth random images in -1..1 with random rectangles taken out, and the masks."""
        generator = torch.Generator().manual_seed(self.seed)
        coarse = torch.randn(self.trajectories, 3, 4, 4, generator=generator)
        images = functional.interpolate(coarse, size=self.size, mode="bicubic").clamp(-1, 1)
        masks = random_masks(self.trajectories, self.size, generator)
        return images * (masks < 0.5), masks

    def _masked_latents(self, count: int) -> Call:
        images, masks = (rows[:count] for rows in self._pictures)
        encoder = self.layout.parts["vae_encoder"].module
        with torch.no_grad():
            latents = torch.cat([encoder(image[None])[0] for image in images])
        small = functional.interpolate(masks, size=latents.shape[-2:])
        return {EXTRA_CHANNELS: torch.cat([small, latents], dim=1)}

    def picture(self, index: int) -> dict[str, Any]:
        """What the runner is shown beside the prompt: image and mask of inpainting, else nothing.

        Args:
            index: Number of the drawing.
        """
        if self.layout.kind != "inpainting":
            return {}
        images, masks = self._pictures
        row = index % len(images)
        image = (images[row] / 2 + 0.5).permute(1, 2, 0)
        return {"image": image.numpy(), "mask": masks[row, 0].numpy()}

    def calls(self, part: str) -> list[Call]:
        """Calibration calls of every part but the denoiser, in batches.

        Args:
            part: The part's name.
        """
        if part.startswith("text_encoder"):
            rows = self.token_ids(part, ["", *self.prompts])
            return [{"input_ids": ids} for ids in torch.split(rows, self.batch_size)]
        if part == "vae_encoder":
            return [{"image": image[None]} for image in self._pictures[0]]
        return [{"latents": latents[None]} for latents in self.runs.final_samples]

    def token_ids(self, part: str, prompts: Sequence[str]) -> Tensor:
        """Token numbers of prompts, int64 [N, L], as the pipeline makes them."""
        tokenizer = self.layout.tokenizers[part.replace("text_encoder", "tokenizer")]
        ids: Tensor = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def example(self, part: str, size: Size) -> Call:
        """Inputs of one call with batch 1, made without any run.

        Args:
            part: The part's name.
            size: Image size.
        """
        generator = torch.Generator().manual_seed(self.seed)
        latents = torch.randn(1, *self.layout.latent_shape(size), generator=generator)
        if part.startswith("text_encoder"):
            return {"input_ids": self.token_ids(part, self.prompts[:1])}
        if part == "vae_encoder":
            return {"image": torch.randn(1, 3, *size, generator=generator).clamp(-1, 1)}
        if part == "vae_decoder":
            return {"latents": latents}
        first = {**self._example_conditions, "timestep": torch.full((1,), 500.0)}
        if self.layout.kind == "inpainting":
            mask = torch.ones(1, 1, *latents.shape[-2:])
            return {"sample": torch.cat([latents, mask, latents], dim=1), **first}
        if "added_cond_kwargs" in first:
            embeds = first["added_cond_kwargs"]["text_embeds"]
            first["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": time_ids(*size)}
        return {"sample": latents, **first}

    @cached_property
    def _example_conditions(self) -> Call:
        prompts = list(self.prompts[:1]) if self.layout.kind != "unconditional" else []
        plain, _ = self._conditions(prompts)
        return {name: value for name, value in plain.items() if name != EXTRA_CHANNELS}


def inputs_of(
    pipeline: Any, sizes: Sequence[Size] | None, *, guidance: float | None, **settings: Any
) -> tuple[PipelineInputs, tuple[Size, ...]]:
    """Open a pipeline; how its parts are called, and the sizes that it is to draw.

    Args:
        pipeline: As of `open_pipeline`.
        sizes: As of `Layout.check_sizes`.
        guidance: Guidance scale; None takes the pipeline's own.
        **settings: The other fields of `PipelineInputs`.

    Raises:
        MPQError: See `open_pipeline`, `layout_of` and `Layout.check_sizes`.
    """
    layout = layout_of(open_pipeline(pipeline))
    chosen = layout.check_sizes(sizes)
    if layout.kind == "unconditional":
        guidance = 1.0
    elif guidance is None:
        guidance = default_guidance(type(layout.pipeline))
    return PipelineInputs(layout=layout, size=chosen[0], guidance=guidance, **settings), chosen


class DenoiserCalls:
    """Recorded calls as the denoiser's program gets them.

    Timesteps are float: every scheduler's fit, whole or fractional.

    Args:
        runs: The float pipeline's runs.
    """

    def __init__(self, runs: Trajectories) -> None:
        self._runs = runs

    @property
    def held_out_calls(self) -> range:
        """Indices of the calls that hold rows of the held-out runs alone."""
        return self._runs.held_out_calls

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Yield keyword arguments of the UNet."""
        for call in self._runs:
            yield {**call, "timestep": call["timestep"].float()}
