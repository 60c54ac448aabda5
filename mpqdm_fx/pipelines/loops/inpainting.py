"""Painting into a picture with a denoiser of nine channels: latents, mask, masked picture."""

from typing import ClassVar

import torch
from torch.nn import functional

from mpqdm_fx.pipelines.loops.loop import EXTRA, Inputs, Request
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage

__all__ = ["Inpainting"]


class Inpainting(TextToImage):
    """A prompt's picture where the mask is one; around it the picture that is given."""

    needs: ClassVar[tuple[str, ...]] = ("prompt", "image", "mask")

    def conditions(self, request: Request, generator: torch.Generator) -> list[Inputs]:
        """As of text, with mask and masked picture in further channels."""
        assert request.mask is not None  # `needs`
        around = request.pixels * (request.mask < 0.5)
        latents = self.encode_picture(around, request, generator)
        small = functional.interpolate(request.mask, size=latents.shape[-2:])
        extra = {EXTRA: torch.cat([small, latents], dim=1)}
        return [{**run, **extra} for run in super().conditions(request, generator)]
