"""Pictures of prompts that one T5 encoder reads, with the mask of its tokens: PixArt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.loops.prompted import Prompted

__all__ = ["PixArt"]


class PixArt(Prompted):
    """The denoiser is told which of the prompt's tokens are padding."""

    settings: ClassVar[Mapping[str, Any]] = {**Loop.settings, "tokens": int}

    def encode(self, prompt: str) -> Inputs:
        """Embeddings of a prompt, and the mask of its tokens."""
        inputs = self.token_inputs("text_encoder", prompt)
        states = self.parts.run("text_encoder", None, inputs)
        return {**states, "encoder_attention_mask": inputs["attention_mask"].float()}

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt: small letters, as the models were trained."""
        tokens = self.tokens(part, prompt.lower().strip(), self.spec.settings["tokens"])
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """Classifier-free guidance; a learned variance is left out."""
        return super().combine(outputs, request)[:, : self.spec.channels]
