"""Pictures of prompts that two CLIP encoders and perhaps a T5 read: Stable Diffusion 3."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop
from mpqdm_fx.pipelines.loops.prompted import Prompted

__all__ = ["StableDiffusion3"]

_CLIP = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_STATES = "encoder_hidden_states"


class StableDiffusion3(Prompted):
    """CLIP's states stand before those of T5, which are zeros where the encoder is left out."""

    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "clip_tokens": int,
        "t5_tokens": int,
        "width": int,
    }

    def encode(self, prompt: str) -> Inputs:
        """Embeddings of a prompt, and pooled ones."""
        width = self.spec.settings["width"]
        encoded = [self.parts.run(part, None, self.token_inputs(part, prompt)) for part in _CLIP]
        states = torch.cat([outputs[_STATES] for outputs in encoded], dim=-1)
        states = functional.pad(states, (0, width - states.shape[-1]))
        if self.parts.has(_T5):
            long = self.parts.run(_T5, None, self.token_inputs(_T5, prompt))[_STATES]
        else:
            long = torch.zeros(1, self.spec.settings["t5_tokens"], width)
        return {
            _STATES: torch.cat([states, long], dim=1),
            "pooled_projections": torch.cat([o["text_embeds"] for o in encoded], dim=-1),
        }

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What a text encoder gets of a prompt."""
        length = self.spec.settings["t5_tokens" if part == _T5 else "clip_tokens"]
        return {"input_ids": self.tokens(part, prompt, length).input_ids}
