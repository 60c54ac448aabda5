"""Sounds of prompts, told how many seconds they last: Stable Audio Open."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.loops.prompted import Prompted
from mpqdm_fx.pipelines.medium import Medium
from mpqdm_fx.pipelines.sound_files import Sounds

__all__ = ["StableAudio"]

_STATES, _GLOBAL = "encoder_hidden_states", "global_hidden_states"


class StableAudio(Prompted):
    """The model makes the whole length, and is told where the sound ends; the rest is cut off."""

    makes: ClassVar[type[Medium]] = Sounds
    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "tokens": int,
        "sampling_rate": float,
    }

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """Embeddings of the prompt and of the duration.

        With guidance and no negative prompt, zeros stand for all of the prompt's embeddings.
        """
        assert request.prompt is not None  # `needs`
        part = "duration_encoder"
        duration = self.parts.run(part, None, self.once_inputs(part, request))
        runs = [self._told(request.prompt, duration)]
        if self.calls_per_step(request.guidance, self.spec.settings) > 1:
            nothing = torch.zeros_like(runs[0])
            negative = request.negative
            runs.append(nothing if negative is None else self._told(negative, duration))
        return [{_STATES: states, _GLOBAL: duration[_GLOBAL]} for states in runs]

    def once_inputs(self, part: str, request: Request) -> Inputs:
        """What the text encoder gets of the prompt, and the duration's of the seconds."""
        if part == "duration_encoder":
            return {"seconds": torch.tensor([[self._seconds(request)]])}
        return super().once_inputs(part, request)

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """Tokens, and which of them are no padding."""
        tokens = self.tokens(part, prompt, self.spec.settings["tokens"])
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """The sound of latents as long as was asked for, float [1, channels, samples]."""
        sound = self.parts.run("vae_decoder", request.size, {"latents": latents})["sound"]
        return sound[..., : int(self._seconds(request) * self.spec.settings["sampling_rate"])]

    def _told(self, prompt: str, duration: Inputs) -> Tensor:
        """Embeddings of a prompt, then those of where the sound begins and ends."""
        encoded = self.parts.run("text_encoder", None, self.token_inputs("text_encoder", prompt))
        return torch.cat([encoded[_STATES], duration["duration_states"]], dim=1)

    def _seconds(self, request: Request) -> float:
        """Length of the sound; that of the programs where the request does not say."""
        if request.seconds is not None:
            return request.seconds
        return float(request.size[0] / self.spec.settings["sampling_rate"])
