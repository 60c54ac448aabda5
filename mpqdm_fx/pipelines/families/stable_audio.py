"""Stable Audio Open: sounds of prompts and seconds, of latents with one axis."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.families.family import (
    ONE_ENCODER,
    Family,
    Latents,
    denoiser_part,
    ready,
    sized_part,
)
from mpqdm_fx.pipelines.loops import stable_audio
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.prompts import SOUND_PROMPTS

__all__ = [
    "DurationEncoder",
    "ProjectedText",
    "SoundDecoder",
    "StableAudio",
    "StableAudioDenoiser",
]


class StableAudio(Family):
    """A T5 encoder, embeddings of seconds, a transformer, and a decoder of waveforms."""

    loop: ClassVar[type[Loop]] = stable_audio.StableAudio
    needed: ClassVar[tuple[str, ...]] = (*ONE_ENCODER, "projection_model")
    decoders: ClassVar[tuple[str, ...]] = ("AutoencoderOobleck",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    prompts: ClassVar[tuple[str, ...]] = SOUND_PROMPTS

    def check(self, pipeline: Any) -> None:
        """Refuse schedulers that the pipeline itself cannot draw with, and odd latents."""
        super().check(pipeline)
        scheduler = pipeline.scheduler
        if not (hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input")):
            raise ConfigError(
                f"diffusers' {type(pipeline).__name__} cannot draw with "
                f"{type(scheduler).__name__}, which scales neither the first noise nor the model's "
                f"input; give the scheduler that the model was trained with, for example "
                f"CosineDPMSolverMultistepScheduler"
            )
        channels = pipeline.vae.config.decoder_input_channels
        if channels != pipeline.transformer.config.in_channels:
            raise ConfigError(
                f"the transformer makes {pipeline.transformer.config.in_channels} channels of "
                f"latents, and the vae decodes {channels}; give those that were trained together"
            )

    def parts(self, pipeline: Any) -> Sequence[Part]:
        """Text encoder, embeddings of the duration, denoiser, decoder."""
        projection = ready(pipeline.projection_model)
        text = ProjectedText(ready(pipeline.text_encoder), projection.text_projection)
        return [
            Part(
                name="text_encoder", module=text.eval(), outputs=("encoder_hidden_states",),
                sized=False,
            ),
            Part(
                name="duration_encoder", module=DurationEncoder(projection).eval(),
                outputs=("duration_states", "global_hidden_states"), sized=False,
            ),
            denoiser_part(StableAudioDenoiser(ready(pipeline.transformer))),
            sized_part("vae_decoder", SoundDecoder(ready(pipeline.vae)), ("sound",)),
        ]  # fmt: skip

    def latents(self, pipeline: Any) -> Latents:
        """A row of them, of the length that the transformer was trained on."""
        scale = int(pipeline.vae.hop_length)
        config = pipeline.transformer.config
        return Latents(
            channels=int(config.in_channels),
            scale=scale,
            multiple=scale,
            sides=(int(config.sample_size),),
        )

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """Tokens of a prompt, and samples a second."""
        return {
            **super().settings(pipeline),
            "tokens": int(pipeline.tokenizer.model_max_length),
            "sampling_rate": float(pipeline.vae.config.sampling_rate),
        }


class ProjectedText(nn.Module):
    """Token numbers to the states that the denoiser attends to; those of padding are zero.

    Args:
        encoder: A `T5EncoderModel`.
        projection: From its width to the denoiser's; an identity where they are the same.
    """

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token numbers and their mask, int64 [B, L], to float [B, L, D]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        projected: Tensor = self.projection(states)
        return projected * attention_mask.unsqueeze(-1).to(projected.dtype)


class DurationEncoder(nn.Module):
    """Where a sound ends, in seconds, to embeddings of its beginning (second 0) and its end.

    Args:
        projection: A `StableAudioProjectionModel`.
    """

    def __init__(self, projection: Any) -> None:
        super().__init__()
        self.end = projection.end_number_conditioner
        with torch.no_grad():
            start = projection.start_number_conditioner(torch.zeros(1, 1))
        self.start: Tensor
        self.register_buffer("start", start)

    def forward(self, seconds: Tensor) -> tuple[Tensor, Tensor]:
        """Embed seconds, float [B, 1], to two tokens [B, 2, D], and both in one [B, 1, 2 D]."""
        end = self.end(seconds)
        start = self.start.expand(end.shape[0], -1, -1)
        return torch.cat([start, end], dim=1), torch.cat([start, end], dim=2)


class StableAudioDenoiser(nn.Module):
    """A `StableAudioDiTModel` that knows its places; its layers have their own names.

    The pipeline hands the model the rotary embedding, which is the same in every call.

    Args:
        model: The transformer, in evaluation mode and float32.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        for name, child in model.named_children():
            self.add_module(name, child)
        # what the model's own forward reads beside its layers
        self.dtype = torch.float32
        self.gradient_checkpointing = False
        self._forward = type(model).forward
        # of one global token and all latents
        places = 1 + int(model.config.sample_size)
        width = int(model.config.attention_head_dim) // 2
        cosines, sines = get_1d_rotary_pos_embed(
            width, places, use_real=True, repeat_interleave_real=False
        )
        self.cosines: Tensor
        self.sines: Tensor
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        global_hidden_states: Tensor,
    ) -> Tensor:
        """Predict what the scheduler takes.

        Args:
            hidden_states: Latents, float [B, C, L].
            timestep: Noise levels as the scheduler tells them, float [B].
            encoder_hidden_states: States of the prompt and of the duration, float [B, T, D].
            global_hidden_states: The duration in one token, float [B, 1, 2 D].

        Returns:
            float [B, C, L].

        Raises:
            ConfigError: There are more latents than the model has places.
        """
        tokens = 1 + hidden_states.shape[-1]
        if tokens > len(self.cosines):
            raise ConfigError(
                f"a sound of {tokens - 1} latents is longer than this transformer's sample_size "
                f"{self.config['sample_size']}; export shorter sizes"
            )
        predicted: Tensor = self._forward(
            self,
            hidden_states,
            timestep,
            encoder_hidden_states=encoder_hidden_states,
            global_hidden_states=global_hidden_states,
            rotary_embedding=(self.cosines[:tokens], self.sines[:tokens]),
            return_dict=False,
        )[0]
        return predicted


class SoundDecoder(nn.Module):
    """Latents as the scheduler leaves them to a waveform, about -1 to 1.

    Args:
        vae: `AutoencoderOobleck`.
    """

    #: Parameters of the other half.
    unread = ("vae.encoder.",)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, L] to waveforms [B, channels, samples]."""
        sound: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return sound
