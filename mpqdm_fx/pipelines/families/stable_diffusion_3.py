"""Stable Diffusion 3, with T5 and without."""

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
    transformer_latents,
)
from mpqdm_fx.pipelines.loops import stable_diffusion_3
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import ImageDecoder, Part, PenultimateStates, TextEncoder

__all__ = ["StableDiffusion3"]

_STATES = "encoder_hidden_states"
_T5_TOKENS = 256  # as the pipeline has them by default


class StableDiffusion3(Family):
    """Two CLIP encoders that pool, perhaps a T5, a transformer, and a VAE's decoder."""

    loop: ClassVar[type[Loop]] = stable_diffusion_3.StableDiffusion3
    needed: ClassVar[tuple[str, ...]] = TWO_ENCODERS
    decoders: ClassVar[tuple[str, ...]] = PICTURE_DECODERS
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoders, denoiser, decoder, whose latents are shifted."""
        parts = [
            Part(
                name=key,
                module=PenultimateStates(ready(getattr(pipeline, key)), pooled=True).eval(),
                outputs=(_STATES, "text_embeds"),
                sized=False,
            )
            for key in ("text_encoder", "text_encoder_2")
        ]
        if getattr(pipeline, "text_encoder_3", None) is not None:
            long = TextEncoder(ready(pipeline.text_encoder_3)).eval()
            parts.append(Part(name="text_encoder_3", module=long, outputs=(_STATES,), sized=False))
        decoder = ImageDecoder(ready(pipeline.vae), shifted=True)
        parts.append(denoiser_part(pipeline.transformer))
        parts.append(sized_part("vae_decoder", decoder, ("image",)))
        return parts

    def latents(self, pipeline: Any) -> Latents:
        """As the VAE has them; sides are whole patches."""
        return transformer_latents(pipeline)

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt, and the width of its embeddings."""
        return {
            **super().settings(pipeline),
            "clip_tokens": int(pipeline.tokenizer.model_max_length),
            "t5_tokens": _T5_TOKENS,
            "width": int(pipeline.transformer.config.joint_attention_dim),
        }
