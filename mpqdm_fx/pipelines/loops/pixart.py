"""Pictures of prompts that one T5 encoder reads, with the mask of its tokens: PixArt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request, guide
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["PixArt"]


class PixArt(Loop):
    """The denoiser is told which of the prompt's tokens are padding."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    negatives: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {**Loop.settings, "tokens": int}

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance."""
        return 2 if guidance > 1 else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """Embeddings and mask of the prompt, and with guidance of the negative prompt."""
        assert request.prompt is not None  # `needs`
        prompts = [request.prompt, request.negative or ""]
        calls = self.calls_per_step(request.guidance, self.spec.settings)
        return [self.encode(prompt) for prompt in prompts[:calls]]

    def encode(self, prompt: str) -> Inputs:
        """Embeddings of a prompt, and the mask of its tokens."""
        inputs = self.token_inputs("text_encoder", prompt)
        states = self.parts.run("text_encoder", None, inputs)
        return {**states, "encoder_attention_mask": inputs["attention_mask"].float()}

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt: small letters, as the models were trained."""
        with refusals("the tokenizer cannot read the prompt"):
            tokens = self.spec.tokenizer("tokenizer")(
                [prompt.lower().strip()],
                padding="max_length",
                max_length=self.spec.settings["tokens"],
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """Classifier-free guidance; a learned variance is left out."""
        return guide(outputs, request.guidance)[:, : self.spec.channels]
