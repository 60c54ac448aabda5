"""Z-Image: a language model reads the prompt, and one transformer text and picture together."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.chat_template import around_prompts
from mpqdm_fx.pipelines.families.family import (
    ONE_ENCODER,
    PICTURE_DECODERS,
    Family,
    Latents,
    denoiser_part,
    ready,
    sized_part,
)
from mpqdm_fx.pipelines.families.z_image_denoiser import ZImageDenoiser
from mpqdm_fx.pipelines.loops import z_image
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import ImageDecoder, Part, PenultimateStates

__all__ = ["ZImage"]

_TOKENS = 512  # of a prompt, as the pipeline has them by default
_PIXELS = 1024  # of a side, as the pipeline draws by default


class ZImage(Family):
    """A language model, a transformer with rows for the longest prompt, and a VAE's decoder."""

    loop: ClassVar[type[Loop]] = z_image.ZImage
    needed: ClassVar[tuple[str, ...]] = ONE_ENCODER
    decoders: ClassVar[tuple[str, ...]] = PICTURE_DECODERS
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def check(self, pipeline: Any) -> None:
        """Refuse transformers of other patches, and with too few places for prompts."""
        super().check(pipeline)
        config = pipeline.transformer.config
        if (2, 1) not in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
            raise ConfigError(
                f"the transformer has patches {list(config.all_patch_size)} by "
                f"{list(config.all_f_patch_size)}; ZImagePipeline draws with those of 2 by 1"
            )
        if config.axes_lens[0] < _TOKENS + 2:
            raise ConfigError(
                f"the transformer's axes_lens {list(config.axes_lens)} have no places for prompts "
                f"of {_TOKENS} tokens and a picture; the first must be at least {_TOKENS + 2}"
            )

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoder, denoiser, decoder, whose latents are shifted."""
        encoder = PenultimateStates(ready(pipeline.text_encoder), pooled=False).eval()
        denoiser = denoiser_part(ZImageDenoiser(ready(pipeline.transformer)))
        # of another length in pictures of another size, so they are no conditions read once
        stepped = (*denoiser.stepped, "attended", "start")
        decoder = ImageDecoder(ready(pipeline.vae), shifted=True)
        return [
            Part(
                name="text_encoder", module=encoder, outputs=("encoder_hidden_states",),
                sized=False,
            ),
            sized_part("denoiser", denoiser.module, denoiser.outputs, stepped=stepped),
            sized_part("vae_decoder", decoder, ("image",)),
        ]  # fmt: skip

    def latents(self, pipeline: Any) -> Latents:
        """As the VAE has them; a token is two by two of them."""
        scale = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        return Latents(
            channels=int(pipeline.transformer.config.in_channels),
            scale=scale,
            multiple=2 * scale,
            sides=(_PIXELS // scale, _PIXELS // scale),
        )

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt, and the template's text around it."""
        return {
            **super().settings(pipeline),
            "tokens": _TOKENS,
            **around_prompts(pipeline.tokenizer, thinking=True),
        }
