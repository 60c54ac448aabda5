"""Stable Diffusion 1, 2 and XL and what is distilled from them: LCM, SDXS, Turbo, Lightning."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.family import (
    PICTURE_DECODERS,
    Family,
    Latents,
    denoiser_part,
    ready,
    sides_of,
    sized_part,
)
from mpqdm_fx.pipelines.loops.image_to_image import ImageToImage
from mpqdm_fx.pipelines.loops.inpainting import Inpainting
from mpqdm_fx.pipelines.loops.instruct_pix2pix import InstructPix2Pix
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.loops.text_to_image import TextToImage
from mpqdm_fx.pipelines.parts import (
    ImageDecoder,
    ImageEncoder,
    Part,
    PenultimateStates,
    TextEncoder,
)

__all__ = [
    "StableDiffusion",
    "StableDiffusionImageToImage",
    "StableDiffusionInpainting",
    "StableDiffusionInstructPix2Pix",
    "StableDiffusionXL",
    "StableDiffusionXLImageToImage",
    "encoder_part",
]

_STATES = "encoder_hidden_states"


class StableDiffusion(Family):
    """A text encoder, a UNet, and the decoder of a VAE, full or tiny."""

    loop: ClassVar[type[Loop]] = TextToImage
    needed: ClassVar[tuple[str, ...]] = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")
    decoders: ClassVar[tuple[str, ...]] = PICTURE_DECODERS
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    #: Channels that the denoiser sees beside the latents, for one of the latents'.
    extra: ClassVar[str | None] = None
    #: Whether latents are normalised by the mean and deviation that the VAE's config has.
    normalised: ClassVar[bool] = False

    def check(self, pipeline: Any) -> None:
        """Refuse denoisers of other columns, and text encoders that want a mask."""
        super().check(pipeline)
        taken = int(pipeline.unet.config.in_channels)
        latents = int(pipeline.vae.config.latent_channels)
        expected = {None: latents, "mask": 2 * latents + 1, "image": 2 * latents}[self.extra]
        if taken != expected:
            named = {
                None: "the latents alone",
                "mask": "latents, mask, masked image",
                "image": "latents, image",
            }
            raise ConfigError(
                f"the UNet of this {type(pipeline).__name__} takes {taken} channels; only models "
                f"with {expected} ({named[self.extra]}) are supported"
            )
        for key in ("text_encoder", "text_encoder_2"):
            encoder = getattr(pipeline, key, None)
            if encoder is not None and getattr(encoder.config, "use_attention_mask", False):
                raise ConfigError(f"{key} wants an attention mask, which programs do not take")

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """The encoder of a picture that is given, text encoders, denoiser, decoder."""
        vae = ready(pipeline.vae)
        parts = [*self.text_parts(pipeline), *self.stepped_parts(pipeline)]
        decoder = ImageDecoder(vae, normalised=self.normalised)
        parts.append(sized_part("vae_decoder", decoder, ("image",)))
        if "image" in self.loop.needs:
            parts.insert(0, self.encoder(vae))
        return parts

    def encoder(self, vae: Any) -> Part:
        """The part that makes latents of a picture."""
        return encoder_part(ImageEncoder(vae, normalised=self.normalised))

    def text_parts(self, pipeline: Any) -> Sequence[Part]:
        """What makes embeddings of tokens."""
        module = TextEncoder(ready(pipeline.text_encoder)).eval()
        return [Part(name="text_encoder", module=module, outputs=(_STATES,), sized=False)]

    def stepped_parts(self, pipeline: Any) -> Sequence[Part]:
        """What runs in every step."""
        return [denoiser_part(pipeline.unet)]

    def latents(self, pipeline: Any) -> Latents:
        """As the VAE has them."""
        config = pipeline.vae.config
        scale = 2 ** (len(config.block_out_channels) - 1)
        return Latents(
            channels=int(config.latent_channels),
            scale=scale,
            multiple=scale,
            sides=sides_of(pipeline.unet.config),
        )

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Distilled guidance, size conditions, zeroed negative prompts."""
        return {
            **super().settings(pipeline),
            "time_cond_proj_dim": pipeline.unet.config.get("time_cond_proj_dim"),
            "time_ids": pipeline.unet.config.get("addition_embed_type") == "text_time",
            "force_zeros_for_empty_prompt": bool(
                pipeline.config.get("force_zeros_for_empty_prompt", False)
            ),
        }


class StableDiffusionXL(StableDiffusion):
    """Two text encoders, the last but one of their states, pooled embeddings and sizes."""

    needed: ClassVar[tuple[str, ...]] = (
        *StableDiffusion.needed,
        "text_encoder_2",
        "tokenizer_2",
    )
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    normalised: ClassVar[bool] = True

    def text_parts(self, pipeline: Any) -> Sequence[Part]:
        """Both encoders; the second one pools."""
        return [
            Part(
                name=key,
                module=PenultimateStates(ready(getattr(pipeline, key)), pooled=pooled).eval(),
                outputs=(_STATES, "text_embeds") if pooled else (_STATES,),
                sized=False,
            )
            for key, pooled in (("text_encoder", False), ("text_encoder_2", True))
        ]


class StableDiffusionInpainting(StableDiffusion):
    """Nine channels: latents, mask, masked picture."""

    loop: ClassVar[type[Loop]] = Inpainting
    extra: ClassVar[str | None] = "mask"


class StableDiffusionImageToImage(StableDiffusion):
    """Text to image that starts from a picture."""

    loop: ClassVar[type[Loop]] = ImageToImage


class StableDiffusionXLImageToImage(StableDiffusionXL):
    """The same of XL; its refiner is told a score, and is no text to image."""

    loop: ClassVar[type[Loop]] = ImageToImage

    def check(self, pipeline: Any) -> None:
        """Refuse the refiner too."""
        super().check(pipeline)
        if pipeline.config.get("requires_aesthetics_score"):
            raise ConfigError(
                "this StableDiffusionXLImg2ImgPipeline is a refiner, which is told an aesthetic "
                "score; only base models are supported"
            )


class StableDiffusionInstructPix2Pix(StableDiffusion):
    """Eight channels: latents, and the picture's, which are not scaled."""

    loop: ClassVar[type[Loop]] = InstructPix2Pix
    extra: ClassVar[str | None] = "image"

    def encoder(self, vae: Any) -> Part:
        """Latents as the VAE has them."""
        return encoder_part(ImageEncoder(vae, scaled=False))


def encoder_part(module: ImageEncoder) -> Part:
    """An encoder of pictures; a tiny VAE's latents have no deviation."""
    return sized_part("vae_encoder", module, module.outputs)
