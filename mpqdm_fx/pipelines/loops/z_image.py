"""Pictures of prompts that a language model reads, as many tokens as there are: Z-Image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.pipelines.loops.chat import Chat
from mpqdm_fx.pipelines.loops.loop import Inputs, Request
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["ZImage"]

_MULTIPLE = 32  # of tokens: the model fills sequences up with tokens that it has learned
_PATCH = 2  # side of a token, in latents


class ZImage(Chat):
    """The denoiser is told how much of a prompt's fixed length is read.

    Guidance is what is added to the prediction with the prompt: from 0 on, and not from 1.
    """

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance."""
        return 2 if guidance > 0 else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of prompts, with what is read of text and picture together."""
        height, width = (side // (self.spec.scale * _PATCH) for side in request.size)
        tokens = _filled(height * width)
        return [
            {**run, "attended": functional.pad(run["cap_attended"], (tokens, 0), value=1.0)}
            for run in super().conditions(request, generator)
        ]

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt, int64 [1, tokens]."""
        return {"input_ids": self.message(prompt).input_ids}

    def message(self, prompt: str) -> Any:
        """As of `Chat`; padding stands behind, so that a causal encoder needs no mask of it."""
        with refusals("the tokenizer cannot read the prompt"):
            self.spec.tokenizer("tokenizer").padding_side = "right"
        return super().message(prompt)

    def encode(self, prompt: str) -> Inputs:
        """States of a prompt's tokens, which of the rows they are, and the picture's place.

        Args:
            prompt: The prompt.
        """
        message = self.message(prompt)
        run = self.parts.run("text_encoder", None, {"input_ids": message.input_ids})
        mask = message.attention_mask.float()
        read = _filled(int(mask.sum()))
        return {
            "cap_feats": run["encoder_hidden_states"],
            "cap_mask": mask,
            "cap_attended": (torch.arange(mask.shape[1]) < read).float()[None],
            "start": torch.tensor([read + 1]),
        }

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """The prediction with the prompt, and its weighted distance from the one without."""
        prompted, *plain = outputs
        return prompted + request.guidance * (prompted - plain[0]) if plain else prompted


def _filled(tokens: int) -> int:
    """Length of a sequence with what it is filled up with."""
    return -(-tokens // _MULTIPLE) * _MULTIPLE
