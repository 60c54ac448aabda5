"""What loops that draw what a prompt says have in common.

This file is copied into exported folders with the loops that are made from it.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import Inputs, Loop, Request
from mpqdm_fx.pipelines.program_files import refusals

__all__ = ["Prompted", "guide"]


class Prompted(Loop):
    """A prompt's picture from noise; with guidance a second call with the negative prompt."""

    needs: ClassVar[tuple[str, ...]] = ("prompt",)
    negatives: ClassVar[bool] = True

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Two with guidance."""
        return 2 if guidance > 1 else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """Embeddings of the prompt, and with guidance of the negative prompt."""
        assert request.prompt is not None  # `needs`
        runs = [self.encode(request.prompt)]
        if self.calls_per_step(request.guidance, self.spec.settings) > 1:
            runs.append(self.negative(runs[0], request.negative))
        return runs

    def encode(self, prompt: str) -> Inputs:
        """What the denoiser is conditioned on by a prompt.

        Args:
            prompt: It.
        """
        raise NotImplementedError

    def negative(self, prompted: Inputs, negative: str | None) -> Inputs:
        """What it is conditioned on by the negative prompt.

        Args:
            prompted: The prompt's conditions.
            negative: The negative prompt; None is an empty one.
        """
        return self.encode(negative or "")

    def once_inputs(self, part: str, request: Request) -> Inputs:
        """What a part gets that runs once, whatever the size: a text encoder tokens.

        Args:
            part: Its name.
            request: What is asked for, with a prompt.
        """
        assert request.prompt is not None  # `needs`
        return self.token_inputs(part, request.prompt)

    def token_inputs(self, part: str, prompt: str) -> Inputs:
        """What a text encoder gets of a prompt.

        Args:
            part: The encoder's name.
            prompt: The prompt.
        """
        return {"input_ids": self.tokens(part, prompt).input_ids}

    def tokens(self, part: str, prompt: str, length: int | None = None) -> Any:
        """A prompt as its tokenizer reads it, padded and cut, with a batch of one.

        Args:
            part: Name of the text encoder that the tokenizer is for.
            prompt: The prompt.
            length: Tokens; None: those that the tokenizer was made for.

        Returns:
            `input_ids` and `attention_mask`, int64 [1, length].

        Raises:
            RunnerError: The tokenizer cannot read it.
        """
        name = part.replace("text_encoder", "tokenizer")
        with refusals(f"the {name} cannot read the prompt"):
            tokenizer = self.spec.tokenizer(name)
            return tokenizer(
                [_with_all_vectors(prompt, tokenizer)],
                padding="max_length",
                max_length=tokenizer.model_max_length if length is None else length,
                truncation=True,
                return_tensors="pt",
            )

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """Classifier-free guidance."""
        return guide(outputs, request.guidance)


def _with_all_vectors(prompt: str, tokenizer: Any) -> str:
    """A prompt in which the word of a textual inversion has all of its tokens.

    Gal et al. 2022. As diffusers' pipelines have it: of a word with several vectors the first is
    the token `<word>`, and behind it come `<word>_1`, `<word>_2` and so on.
    """
    known = tokenizer.added_tokens_encoder
    several = [token for token in known if f"{token}_1" in known]
    if not several:
        return prompt
    read = set(tokenizer.tokenize(prompt))
    for token in several:
        if token in read:
            names = (f"{token}_{number}" for number in itertools.count(1))
            further = itertools.takewhile(known.__contains__, names)
            prompt = prompt.replace(token, " ".join([token, *further]))
    return prompt


def guide(outputs: Sequence[Tensor], guidance: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, equation 6).

    Args:
        outputs: With the prompt, and without it; or the first alone, which is returned.
        guidance: Its weight.
    """
    conditional, *plain = outputs
    return plain[0] + guidance * (conditional - plain[0]) if plain else conditional
