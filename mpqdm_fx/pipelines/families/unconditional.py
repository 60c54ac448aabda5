"""DDPM, DDIM and latent diffusion without conditions."""

from collections.abc import Sequence
from typing import Any, ClassVar

from mpqdm_fx.pipelines.families.family import (
    Family,
    Latents,
    denoiser_part,
    ready,
    sides_of,
    sized_part,
)
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.loops.unconditional import Unconditional
from mpqdm_fx.pipelines.parts import ImageDecoder, Part

__all__ = ["AncestralPixelDiffusion", "LatentDiffusion", "PixelDiffusion"]


class PixelDiffusion(Family):
    """A UNet whose samples are pictures."""

    loop: ClassVar[type[Loop]] = Unconditional

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """The denoiser."""
        return [denoiser_part(pipeline.unet)]

    def latents(self, pipeline: Any) -> Latents:
        """Pixels."""
        config = pipeline.unet.config
        return Latents(
            channels=int(config.in_channels), scale=1, multiple=1, sides=sides_of(config)
        )


class AncestralPixelDiffusion(PixelDiffusion):
    """DDPM, whose pipeline leaves the share of noise to the scheduler."""

    eta: ClassVar[float | None] = None


class LatentDiffusion(PixelDiffusion):
    """A UNet whose samples a vector quantizer's decoder makes pictures of."""

    needed: ClassVar[tuple[str, ...]] = ("unet", "scheduler", "vqvae")
    decoders: ClassVar[tuple[str, ...]] = ("VQModel", "AutoencoderKL")

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Denoiser and decoder."""
        decoder = ImageDecoder(ready(pipeline.vqvae))
        return [denoiser_part(pipeline.unet), sized_part("vae_decoder", decoder, ("image",))]

    def latents(self, pipeline: Any) -> Latents:
        """As the decoder takes them."""
        config = pipeline.unet.config
        scale = 2 ** (len(pipeline.vqvae.config.block_out_channels) - 1)
        return Latents(
            channels=int(config.in_channels), scale=scale, multiple=scale, sides=sides_of(config)
        )
