"""Prompts as messages to a language model: what its chat template puts around them is text.

This file is copied into exported folders with the loops that are made from it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop
from mpqdm_fx.pipelines.loops.prompted import Prompted
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["Chat"]


class Chat(Prompted):
    """Padding stands behind the message, so a causal encoder needs no mask of it."""

    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "tokens": int,
        "before": str,
        "after": str,
    }

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt, int64 [1, tokens]."""
        return {"input_ids": self.message(prompt).input_ids}

    def message(self, prompt: str) -> Any:
        """Tokens of a prompt inside the template, as of `tokens`.

        Args:
            prompt: The prompt.
        """
        settings = self.spec.settings
        with refusals("the tokenizer cannot read the prompt"):
            self.spec.tokenizer("tokenizer").padding_side = "right"
        text = f"{settings['before']}{prompt}{settings['after']}"
        return self.tokens("text_encoder", text, settings["tokens"])
