"""Pictures of prompts by transformers that read latents as tokens of two by two: Flux."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["Flux"]

_SIDE = 2  # of a token, in latents


class Flux(Loop):
    """The scheduler steps on tokens; guidance is distilled, and told to models that take it."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "clip_tokens": int,
        "t5_tokens": int,
        "guidance_embeds": bool,
    }

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """Embeddings of the prompt, and places of all tokens."""
        assert request.prompt is not None  # `needs`
        pooled = self.parts.run(
            "text_encoder", None, self.token_inputs("text_encoder", request.prompt)
        )
        states = self.parts.run(
            "text_encoder_2", None, self.token_inputs("text_encoder_2", request.prompt)
        )
        tokens = states["encoder_hidden_states"].shape[1]
        run = {**pooled, **states, "txt_ids": torch.zeros(1, tokens, 3)}
        run["img_ids"] = self._places(request)
        if self.spec.settings["guidance_embeds"]:
            run["guidance"] = torch.tensor([request.guidance], dtype=torch.float32)
        return [run]

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What a text encoder gets of a prompt."""
        name = part.replace("text_encoder", "tokenizer")
        length = self.spec.settings["t5_tokens" if part == "text_encoder_2" else "clip_tokens"]
        with refusals(f"the {name} cannot read the prompt"):
            ids: Tensor = self.spec.tokenizer(name)(
                [prompt],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return {"input_ids": ids}

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
