"""Pictures of prompts, as Stable Diffusion 1, 2 and XL and latent consistency models draw them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.loops.prompted import Prompted

__all__ = ["TextToImage", "guidance_embedding", "time_ids"]

_ENCODERS = ("text_encoder", "text_encoder_2")


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


class TextToImage(Prompted):
    """One text encoder or two, whose states stand beside each other."""

    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "time_cond_proj_dim": (int, None),
        "time_ids": bool,
        "force_zeros_for_empty_prompt": bool,
    }

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance, unless the model has it distilled."""
        return 2 if guidance > 1 and settings["time_cond_proj_dim"] is None else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of prompts, with image sizes and guidance for models that are told them."""
        settings = self.spec.settings
        more: Inputs = {}
        if settings["time_ids"]:
            more["added_cond_kwargs.time_ids"] = time_ids(*request.size)
        width = settings["time_cond_proj_dim"]
        if width is not None:
            more["timestep_cond"] = guidance_embedding(request.guidance, width)
        return [{**run, **more} for run in super().conditions(request, generator)]

    def negative(self, prompted: Inputs, negative: str | None) -> Inputs:
        """As of prompts; zeros for None where the model was trained so."""
        if negative is None and self.spec.settings["force_zeros_for_empty_prompt"]:
            return {name: torch.zeros_like(value) for name, value in prompted.items()}
        return super().negative(prompted, negative)

    def encode_picture(
        self, pixels: Tensor, request: Request, generator: torch.Generator
    ) -> Tensor:
        """Latents of a picture, drawn where the VAE has a deviation: a tiny one has none.

        Args:
            pixels: Float [1, 3, H, W] in -1..1.
            request: What is asked for; says the size.
            generator: For the draw.

        Returns:
            Float [1, C, h, w].
        """
        encoded = self.parts.run("vae_encoder", request.size, {"image": pixels})
        mean: Tensor = encoded["mean"]
        if "std" not in encoded:
            return mean
        return mean + encoded["std"] * torch.randn(mean.shape, generator=generator)

    def encode(self, prompt: str) -> Inputs:
        """Embeddings of a prompt; those of two encoders stand beside each other."""
        embeddings: dict[str, list[Tensor]] = {}
        for part in _ENCODERS:
            if self.parts.has(part):
                outputs = self.parts.run(part, None, self.token_inputs(part, prompt))
                for name, value in outputs.items():
                    embeddings.setdefault(name, []).append(value)
        named = {name: torch.cat(values, dim=-1) for name, values in embeddings.items()}
        if "text_embeds" in named:
            named["added_cond_kwargs.text_embeds"] = named.pop("text_embeds")
        return named
