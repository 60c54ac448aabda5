"""Editing a picture as an instruction says (Brooks et al. 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpqdm_fx.pipelines.loops.loop import EXTRA, Inputs, Number, Request
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage

__all__ = ["InstructPix2Pix"]


class InstructPix2Pix(TextToImage):
    """Guidance of two kinds: by the instruction, and by the picture (equation 3)."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "image")
    numbers: ClassVar[Mapping[str, Number]] = {
        "image_guidance": Number(
            default=1.5,
            least=1.0,
            most=1e3,
            text="weight of guidance by the picture",
            argument="image_guidance_scale",
        )
    }

    @classmethod
    def calls_per_step(cls, guidance: float, settings: Mapping[str, Any]) -> int:
        """Three with guidance: instruction and picture, picture alone, neither."""
        return 3 if guidance > 1 else 1

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of text, with the picture's latents, or zeros, in further channels."""
        latents = self.parts.run("vae_encoder", request.size, {"image": request.pixels})["mean"]
        runs = super().conditions(request, generator)
        shown = [{**run, EXTRA: latents} for run in runs]
        return [*shown, *({**run, EXTRA: torch.zeros_like(latents)} for run in runs[1:])]

    def combine(self, outputs: Sequence[Tensor], request: Request) -> Tensor:
        """Both guidances."""
        edited, *plain = outputs
        if not plain:
            return edited
        shown, blank = plain
        by_picture = request.numbers["image_guidance"] * (shown - blank)
        return blank + request.guidance * (edited - shown) + by_picture
