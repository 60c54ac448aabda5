"""Pictures of prompts that a language model reads, with an instruction before them: SANA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.loops.pixart import PixArt
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["Sana"]


class Sana(PixArt):
    """The encoder is causal and padding stands behind, so one length of tokens does for all."""

    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "tokens": int,
        "instruction": str,
        "guidance_scale": ((int, float), None),
    }

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance, unless the model is told it (SANA-Sprint)."""
        return 2 if guidance > 1 and settings["guidance_scale"] is None else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of PixArt; a model with distilled guidance is told it."""
        scale = self.spec.settings["guidance_scale"]
        runs = super().conditions(request, generator)
        told = {} if scale is None else {"guidance": torch.tensor([request.guidance * scale])}
        return [{**run, **told} for run in runs]

    def encode(self, prompt: str) -> Inputs:
        """States and mask of a prompt behind the instruction."""
        return self._chosen(prompt, self.spec.settings["instruction"])

    def negative(self, prompted: Inputs, negative: str | None) -> Inputs:
        """States and mask without any instruction."""
        return self._chosen(negative or "", "")

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt, with the instruction."""
        return self._tokens(prompt, self.spec.settings["instruction"])

    def _chosen(self, prompt: str, instruction: str) -> Inputs:
        """States of the first token and of the prompt's; without an instruction of the first."""
        count = self.spec.settings["tokens"]
        inputs = self._tokens(prompt, instruction)
        states = self.parts.run("text_encoder", None, inputs)["encoder_hidden_states"]
        mask = inputs["attention_mask"].float()
        if not instruction:
            return {
                "encoder_hidden_states": states[:, :count],
                "encoder_attention_mask": mask[:, :count],
            }
        return {
            "encoder_hidden_states": _first_and_last(states, count),
            "encoder_attention_mask": _first_and_last(mask, count),
        }

    def _tokens(self, prompt: str, instruction: str) -> Inputs:
        part, count = "text_encoder", self.spec.settings["tokens"]
        before = self.spec.settings["instruction"]
        with refusals("the tokenizer cannot read the prompt"):
            tokenizer = self.spec.tokenizer("tokenizer")
            tokenizer.padding_side = "right"
            length = len(tokenizer.encode(before)) + count - 2 if before else count
        # a prompt without instruction is cut where it would be alone
        cut = length if instruction else count
        tokens = self.tokens(part, instruction + prompt.lower().strip(), cut)
        padded = torch.full((1, length - cut), tokenizer.pad_token_id)
        return {
            "input_ids": torch.cat([tokens.input_ids, padded], dim=1),
            "attention_mask": torch.cat([tokens.attention_mask, torch.zeros_like(padded)], dim=1),
        }


def _first_and_last(rows: Tensor, count: int) -> Tensor:
    """The first entry of the second axis, and the last ones, `count` in all."""
    return torch.cat([rows[:, :1], rows[:, rows.shape[1] - count + 1 :]], dim=1)
