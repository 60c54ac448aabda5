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
        runs = [self._chosen(request.prompt or "", self.spec.settings["instruction"])]
        if self.calls_per_step(request.guidance, self.spec.settings) > 1:
            runs.append(self._chosen(request.negative or "", ""))
        told = {} if scale is None else {"guidance": torch.tensor([request.guidance * scale])}
        return [{**run, **told} for run in runs]

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
        with refusals("the tokenizer cannot read the prompt"):
            tokenizer = self.spec.tokenizer("tokenizer")
            tokenizer.padding_side = "right"
            before = self.spec.settings["instruction"]
            count = self.spec.settings["tokens"]
            length = len(tokenizer.encode(before)) + count - 2 if before else count
            # a prompt without instruction is cut where it would be alone
            own = length if instruction else count
            tokens = tokenizer(
                [instruction + prompt.lower().strip()],
                padding="max_length",
                max_length=own,
                truncation=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            ids, mask = tokens.input_ids, tokens.attention_mask
            padded = torch.full((1, length - own), tokenizer.pad_token_id)
        return {
            "input_ids": torch.cat([ids, padded], dim=1),
            "attention_mask": torch.cat([mask, torch.zeros_like(padded)], dim=1),
        }


def _first_and_last(rows: Tensor, count: int) -> Tensor:
    """The first entry of the second axis, and the last ones, `count` in all."""
    return torch.cat([rows[:, :1], rows[:, rows.shape[1] - count + 1 :]], dim=1)
