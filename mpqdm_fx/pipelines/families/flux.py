"""Flux.1: CLIP's pooled embedding, T5's states, and latents cut into tokens."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpqdm_fx.pipelines.families.family import (
    PICTURE_DECODERS,
    TWO_ENCODERS,
    Family,
    Latents,
    denoiser_part,
    ready,
    sized_part,
)
from mpqdm_fx.pipelines.loops import flux
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import ImageDecoder, Part, PooledText, TextEncoder

__all__ = ["Flux"]

_T5_TOKENS = 512  # as the pipeline has them by default


class Flux(Family):
    """Two text encoders, a transformer, and a VAE's decoder."""

    loop: ClassVar[type[Loop]] = flux.Flux
    needed: ClassVar[tuple[str, ...]] = TWO_ENCODERS
    decoders: ClassVar[tuple[str, ...]] = PICTURE_DECODERS
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoders, denoiser, decoder, whose latents are shifted."""
        pooled = PooledText(ready(pipeline.text_encoder)).eval()
        states = TextEncoder(ready(pipeline.text_encoder_2)).eval()
        denoiser = denoiser_part(pipeline.transformer)
        decoder = ImageDecoder(ready(pipeline.vae), shifted=True)
        # places of tokens are another size's, so they are no condition that is read once
        stepped = (*denoiser.stepped, "img_ids")
        return [
            Part(
                name="text_encoder", module=pooled, outputs=("pooled_projections",), sized=False
            ),
            Part(
                name="text_encoder_2", module=states, outputs=("encoder_hidden_states",),
                sized=False,
            ),
            sized_part("denoiser", denoiser.module, denoiser.outputs, stepped=stepped),
            sized_part("vae_decoder", decoder, ("image",)),
        ]  # fmt: skip

    def latents(self, pipeline: Any) -> Latents:
        """As the VAE has them; a token is two by two of them."""
        scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        side = int(pipeline.default_sample_size)
        return Latents(
            channels=int(pipeline.transformer.config.in_channels) // 4,
            scale=scale,
            multiple=2 * scale,
            sides=(side, side),
        )

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt, and whether the model is told its guidance."""
        return {
            **super().settings(pipeline),
            "clip_tokens": int(pipeline.tokenizer.model_max_length),
            "t5_tokens": _T5_TOKENS,
            "guidance_embeds": bool(pipeline.transformer.config.guidance_embeds),
        }
