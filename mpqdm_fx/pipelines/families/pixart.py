"""PixArt-Sigma, and PixArt-alpha without its conditions on sizes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.family import (
    ONE_ENCODER,
    PICTURE_DECODERS,
    Family,
    Latents,
    denoiser_part,
    ready,
    sized_part,
    transformer_latents,
)
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.loops.pixart import PixArt
from mpqdm_fx.pipelines.parts import ImageDecoder, MaskedTextEncoder, Part

__all__ = ["PixArtAlpha", "PixArtSigma"]

_STATES = "encoder_hidden_states"


class PixArtSigma(Family):
    """A T5 encoder, a transformer, and a VAE's decoder."""

    loop: ClassVar[type[Loop]] = PixArt
    needed: ClassVar[tuple[str, ...]] = ONE_ENCODER
    decoders: ClassVar[tuple[str, ...]] = PICTURE_DECODERS
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    #: Tokens of a prompt, as the pipeline has them by default.
    tokens: ClassVar[int] = 300

    def check(self, pipeline: Any) -> None:
        """Refuse models that are told sizes."""
        super().check(pipeline)
        if getattr(pipeline.transformer, "use_additional_conditions", False):
            raise ConfigError(
                f"the transformer of this {type(pipeline).__name__} is told resolution and aspect "
                f"ratio (use_additional_conditions), which programs are not; only models without "
                f"are supported"
            )

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoder, denoiser, decoder."""
        encoder = MaskedTextEncoder(ready(pipeline.text_encoder)).eval()
        return [
            Part(name="text_encoder", module=encoder, outputs=(_STATES,), sized=False),
            denoiser_part(pipeline.transformer),
            sized_part("vae_decoder", ImageDecoder(ready(pipeline.vae)), ("image",)),
        ]

    def latents(self, pipeline: Any) -> Latents:
        """As the VAE has them; sides are whole patches."""
        return transformer_latents(pipeline)

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt."""
        return {**super().settings(pipeline), "tokens": self.tokens}


class PixArtAlpha(PixArtSigma):
    """The same with shorter prompts."""

    tokens: ClassVar[int] = 120
