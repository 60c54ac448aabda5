"""SANA and SANA-Sprint: a language model reads the prompt, and latents are 32 pixels a side."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from mpqdm_fx.pipelines.families.family import Latents, transformer_latents
from mpqdm_fx.pipelines.families.pixart import PixArtSigma
from mpqdm_fx.pipelines.loops import sana
from mpqdm_fx.pipelines.loops.loop import Loop

__all__ = ["Sana"]


class Sana(PixArtSigma):
    """PixArt's parts with a language model, whose prompt begins with an instruction."""

    loop: ClassVar[type[Loop]] = sana.Sana
    decoders: ClassVar[tuple[str, ...]] = ("AutoencoderDC", "AutoencoderTiny")

    def latents(self, pipeline: Any) -> Latents:
        """As the deep-compression VAE has them."""
        scale = 2 ** (len(pipeline.vae.config.encoder_block_out_channels) - 1)
        return transformer_latents(pipeline, scale=scale)

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """The instruction that the pipeline puts before a prompt, and distilled guidance."""
        parameters = inspect.signature(type(pipeline).__call__).parameters
        config = pipeline.transformer.config
        told = config.get("guidance_embeds", False)
        return {
            **super().settings(pipeline),
            "instruction": "\n".join(parameters["complex_human_instruction"].default or ()),
            "guidance_scale": float(config.guidance_embeds_scale) if told else None,
        }
