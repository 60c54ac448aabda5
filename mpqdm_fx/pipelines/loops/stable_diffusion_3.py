"""Pictures of prompts that two CLIP encoders and perhaps a T5 read: Stable Diffusion 3."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request, guide
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["StableDiffusion3"]

_CLIP = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
_STATES = "encoder_hidden_states"


class StableDiffusion3(Loop):
    """CLIP's states stand before those of T5, which are zeros where the encoder is left out."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    negatives: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "clip_tokens": int,
        "t5_tokens": int,
        "width": int,
    }

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance."""
        return 2 if guidance > 1 else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """Embeddings of the prompt, and with guidance of the negative prompt."""
        assert request.prompt is not None  # `needs`
        prompts = [request.prompt, request.negative or ""]
        calls = self.calls_per_step(request.guidance, self.spec.settings)
        return [self.encode(prompt) for prompt in prompts[:calls]]

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
        name = part.replace("text_encoder", "tokenizer")
        length = self.spec.settings["t5_tokens" if part == _T5 else "clip_tokens"]
        with refusals(f"the {name} cannot read the prompt"):
            ids: Tensor = self.spec.tokenizer(name)(
                [prompt],
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
        return {"input_ids": ids}

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """Classifier-free guidance."""
        return guide(outputs, request.guidance)
