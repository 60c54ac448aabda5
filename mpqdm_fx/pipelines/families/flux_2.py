"""Flux.2 klein: states of a language model's inner layers, and latents cut into tokens."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.chat_template import around_prompts
from mpqdm_fx.pipelines.families.family import (
    ONE_ENCODER,
    Family,
    Latents,
    denoiser_part,
    ready,
    sized_part,
)
from mpqdm_fx.pipelines.loops import flux_2
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import InnerStates, Part

__all__ = ["Flux2", "NormalizedDecoder"]

_TOKENS = 512  # of a prompt, as the pipeline has them by default
_SIDE = 2  # of a token, in the VAE's latents


class Flux2(Family):
    """A language model, a transformer, and a decoder of normalized squares of latents."""

    loop: ClassVar[type[Loop]] = flux_2.Flux2
    needed: ClassVar[tuple[str, ...]] = ONE_ENCODER
    decoders: ClassVar[tuple[str, ...]] = ("AutoencoderKLFlux2",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def check(self, pipeline: Any) -> None:
        """Refuse language models without the layers that are read."""
        super().check(pipeline)
        layers, wanted = pipeline.text_encoder.config.num_hidden_layers, max(_layers(pipeline))
        if layers < wanted:
            raise ConfigError(
                f"the text_encoder has {layers} layers, and the states behind layer {wanted} are "
                f"read; give the pipeline the text encoder that it was trained with"
            )

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoder, denoiser, decoder."""
        encoder = InnerStates(ready(pipeline.text_encoder).base_model, _layers(pipeline)).eval()
        denoiser = denoiser_part(pipeline.transformer)
        # places of tokens are another size's, so they are no condition that is read once
        stepped = (*denoiser.stepped, "img_ids")
        return [
            Part(
                name="text_encoder", module=encoder, outputs=("encoder_hidden_states",),
                sized=False,
            ),
            sized_part("denoiser", denoiser.module, denoiser.outputs, stepped=stepped),
            sized_part("vae_decoder", NormalizedDecoder(ready(pipeline.vae)), ("image",)),
        ]  # fmt: skip

    def latents(self, pipeline: Any) -> Latents:
        """Squares of the VAE's."""
        scale = _SIDE * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
        side = int(pipeline.default_sample_size) // _SIDE
        return Latents(
            channels=int(pipeline.transformer.config.in_channels),
            scale=scale,
            multiple=scale,
            sides=(side, side),
        )

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt, the template's text around it, and whether guidance is left out."""
        return {
            **super().settings(pipeline),
            "tokens": _TOKENS,
            **around_prompts(pipeline.tokenizer, thinking=False),
            "distilled": bool(pipeline.config.is_distilled),
        }


class NormalizedDecoder(nn.Module):
    """Squares of normalized latents to an image in -1..1.

    Args:
        vae: `AutoencoderKLFlux2`, whose batch norm holds the mean and variance of such squares.
    """

    #: Parameters of the other half.
    unread = ("vae.encoder.", "vae.quant_conv.")

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("mean", vae.bn.running_mean.view(1, -1, 1, 1).clone())
        self.register_buffer("deviation", deviation.view(1, -1, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Decode squares [B, 4 C, h, w] to images [B, channels, H, W]."""
        batch, channels, height, width = latents.shape
        squares = latents * self.deviation + self.mean
        squares = squares.reshape(batch, channels // _SIDE**2, _SIDE, _SIDE, height, width)
        joined = squares.permute(0, 1, 4, 2, 5, 3)
        size = (height * _SIDE, width * _SIDE)
        joined = joined.reshape(batch, channels // _SIDE**2, *size)
        image: Tensor = self.vae.decode(joined, return_dict=False)[0]
        return image


def _layers(pipeline: Any) -> tuple[int, ...]:
    """Behind which layers of the text encoder states are read, as the pipeline does by default."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return tuple(parameters["text_encoder_out_layers"].default)
