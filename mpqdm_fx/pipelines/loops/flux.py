"""Pictures of prompts by transformers that read latents as tokens of two by two: Flux."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.loops.prompted import Prompted

__all__ = ["Flux"]

_SIDE = 2  # of a token, in latents


class Flux(Prompted):
    """The scheduler steps on tokens; guidance is distilled, and told to models that take it."""

    negatives: ClassVar[bool] = False
    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "clip_tokens": int,
        "t5_tokens": int,
        "guidance_embeds": bool,
    }

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """One: guidance is distilled."""
        return 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of prompts, with the places of latents, and guidance for models that are told it."""
        (run,) = super().conditions(request, generator)
        run["img_ids"] = self._places(request)
        if self.spec.settings["guidance_embeds"]:
            run["guidance"] = torch.tensor([request.guidance], dtype=torch.float32)
        return [run]

    def encode(self, prompt: str) -> Inputs:
        """CLIP's pooled embedding, T5's states and their places."""
        run: Inputs = {}
        for part in ("text_encoder", "text_encoder_2"):
            run |= self.parts.run(part, None, self.token_inputs(part, prompt))
        return {**run, "txt_ids": torch.zeros(1, run["encoder_hidden_states"].shape[1], 3)}

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What a text encoder gets of a prompt."""
        length = self.spec.settings["t5_tokens" if part == "text_encoder_2" else "clip_tokens"]
        return {"input_ids": self.tokens(part, prompt, length).input_ids}

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """Tokens, and their channels."""
        height, width = self._sides(request)
        return (height * width, self.spec.channels * _SIDE**2)

    def noise(self, request: Request, generator: torch.Generator) -> Tensor:
        """Standard normal latents, cut into tokens, [1, tokens, 4 C]."""
        height, width = self._sides(request)
        channels = self.spec.channels
        noise = torch.randn((1, channels, height * _SIDE, width * _SIDE), generator=generator)
        cut = noise.view(1, channels, height, _SIDE, width, _SIDE).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(1, height * width, channels * _SIDE**2)

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """The picture of tokens."""
        height, width = self._sides(request)
        channels = self.spec.channels
        cut = latents.view(1, height, width, channels, _SIDE, _SIDE).permute(0, 3, 1, 4, 2, 5)
        joined = cut.reshape(1, channels, height * _SIDE, width * _SIDE)
        return super().decode(joined, request)

    def _sides(self, request: Request) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = (side // (self.spec.scale * _SIDE) for side in request.size)
        return height, width

    def _places(self, request: Request) -> Tensor:
        """Row and column of each token behind a zero, float [1, tokens, 3]."""
        height, width = self._sides(request)
        rows = torch.arange(height).repeat_interleave(width)
        columns = torch.arange(width).repeat(height)
        return torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float()[None]
