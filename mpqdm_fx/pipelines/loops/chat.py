"""Prompts as messages to a language model: what its chat template puts around them is text.

This file is copied into exported folders with the loops that are made from it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop
from mpqdm_fx.pipelines.loops.prompted import Prompted

__all__ = ["Chat"]


class Chat(Prompted):
    """One text encoder, whose tokenizer pads a message to one length."""

    settings: ClassVar[Mapping[str, Any]] = {
        **Loop.settings,
        "tokens": int,
        "before": str,
        "after": str,
    }

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What the text encoder gets of a prompt, and which of it is padding."""
        message = self.message(prompt)
        return {"input_ids": message.input_ids, "attention_mask": message.attention_mask}

    def message(self, prompt: str) -> Any:
        """Tokens of a prompt inside the template, as of `tokens`.

        Args:
            prompt: The prompt.
        """
        settings = self.spec.settings
        text = f"{settings['before']}{prompt}{settings['after']}"
        return self.tokens("text_encoder", text, settings["tokens"])
