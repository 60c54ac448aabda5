"""Pictures of prompts by transformers that read squares of latents as tokens: Flux.2 klein."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.chat import Chat
from mpqdm_fx.pipelines.loops.loop import Inputs, Request

__all__ = ["Flux2"]


class Flux2(Chat):
    """The scheduler steps on tokens; each is one of the latents here, a square of the VAE's."""

    negatives: ClassVar[bool] = False
    settings: ClassVar[Mapping[str, Any]] = {**Chat.settings, "distilled": bool}

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance, unless the model is distilled from guided ones."""
        return 2 if guidance > 1 and not settings["distilled"] else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of prompts, with the places of latents."""
        places = self._places(request)
        return [{**run, "img_ids": places} for run in super().conditions(request, generator)]

    def encode(self, prompt: str) -> Inputs:
        """States of a prompt, padding too, and their places."""
        run = self.parts.run("text_encoder", None, self.token_inputs("text_encoder", prompt))
        length = run["encoder_hidden_states"].shape[1]
        places = torch.zeros(1, length, 4)
        places[..., 3] = torch.arange(length)
        return {**run, "txt_ids": places}

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Tokens, and their channels."""
        channels, height, width = super().latent_shape(request)
        return (height * width, channels)

    def noise(self, request: Request, generator: torch.Generator) -> Tensor:
        """Standard normal latents as tokens, [1, tokens, C]."""
        shape = super().latent_shape(request)
        return torch.randn((1, *shape), generator=generator).flatten(2).transpose(1, 2)

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """The picture of tokens."""
        picture = latents.transpose(1, 2).reshape(1, *super().latent_shape(request))
        return super().decode(picture, request)

    def _places(self, request: Request) -> Tensor:
        """Row and column of each token between zeros, float [1, tokens, 4]."""
        _, height, width = super().latent_shape(request)
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        zeros = torch.zeros_like(rows)
        return torch.stack([zeros, rows, columns, zeros], dim=1).float()[None]
