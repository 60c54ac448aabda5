"""The parts of a pipeline, each a module with plain tensors in and out.

What a pipeline does around its networks and what never changes (which hidden state is taken, the
scaling of latents) goes into the part, so that a program needs no configuration to be called. The
denoiser is the pipeline's UNet itself: layer names in settings and reports are the model's own.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpqdm_fx.graph.describe import module_settings
from mpqdm_fx.io.tensors import hash_tensor

__all__ = [
    "ImageDecoder",
    "ImageEncoder",
    "InnerStates",
    "MaskedTextEncoder",
    "Part",
    "PenultimateStates",
    "PooledText",
    "TextEncoder",
]

# Attributes of a model of diffusers or transformers.
_LEFT_BY_FUSING = ("_safe_fusing", "lora_scale", "peft_config", "_hf_peft_config_loaded")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a pipeline.

    Attributes:
        name: `text_encoder`, `text_encoder_2`, `duration_encoder`, `denoiser`, `vae_decoder` or
            `vae_encoder`.
        module: Called with tensors by name; returns a tensor or a tuple of tensors.
        outputs: Names of what it returns, in order.
        sized: Its shapes depend on the size of the image or the sound: one method per size.
        stepped: Arguments that change from step to step of the denoising loop. What depends on all
            others alone is a method of its own. Empty for a part that runs once per image.
    """

    name: str
    module: nn.Module
    outputs: tuple[str, ...]
    sized: bool
    stepped: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of its modules' settings and tensors, 16 hexadecimal digits."""
        digest = _hashed(self._settings)
        for tensor in self.module.state_dict().values():
            hash_tensor(digest, tensor)
        return str(digest.hexdigest()[:16])

    @property
    def settings_digest(self) -> str:
        """Of its modules' settings but for what fusing a LoRA leaves, 16 hexadecimal digits."""
        settings = self._settings
        kept = {name: settings[name] for name in settings if not name.endswith(_LEFT_BY_FUSING)}
        return str(_hashed(kept).hexdigest()[:16])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every tensor of its state."""
        return {name: list(tensor.shape) for name, tensor in self.module.state_dict().items()}

    @property
    def _settings(self) -> dict[str, Any]:
        settings = module_settings(self.module).items()
        # where a model was loaded from is no setting of it
        return {n: _steady(value) for n, value in settings if not n.endswith("name_or_path")}

    @property
    def parameters(self) -> int:
        """Numbers that it reads: of a VAE those of one half."""
        unread = getattr(self.module, "unread", ())
        named = self.module.named_parameters()
        return sum(value.numel() for name, value in named if not name.startswith(unread))


def _steady(setting: Any) -> Any:
    """A setting as it is in every process: diffusers lists the fields left out in a set's order."""
    for entry in setting.get("dict", ()) if isinstance(setting, dict) else ():
        if entry[0] == "_use_default_values":
            entry[1] = sorted(entry[1])
    return setting


def _hashed(settings: Mapping[str, Any]) -> Any:
    """A hash object that has seen settings."""
    return hashlib.sha256(json.dumps(settings).encode())


class TextEncoder(nn.Module):
    """Token numbers to the last hidden state, as Stable Diffusion 1 and 2 are conditioned.

    Args:
        encoder: A `CLIPTextModel` or another encoder whose first output is that state.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode token numbers, int64 [B, L], to float [B, L, D]."""
        states: Tensor = self.encoder(input_ids=input_ids)[0]
        return states


class MaskedTextEncoder(nn.Module):
    """The same for encoders that are told which tokens are padding: T5 of PixArt.

    Args:
        encoder: An encoder whose first output is the last hidden state.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token numbers and their mask, int64 [B, L], to float [B, L, D]."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        return states


class PooledText(nn.Module):
    """Token numbers to CLIP's pooled embedding, as Flux is conditioned beside T5's states.

    Args:
        encoder: A `CLIPTextModel`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode token numbers, int64 [B, L], to float [B, P]."""
        pooled: Tensor = self.encoder(input_ids=input_ids).pooler_output
        return pooled


class PenultimateStates(nn.Module):
    """Token numbers to the last but one hidden state, as Stable Diffusion XL and Z-Image need it.

    Args:
        encoder: One of the pipeline's encoders.
        pooled: Whether it also gives `text_embeds`: the second encoder of XL does.
    """

    def __init__(self, encoder: nn.Module, *, pooled: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Encode token numbers, int64 [B, L], to float [B, L, D], and [B, P] where pooled."""
        output = self.encoder(input_ids=input_ids, output_hidden_states=True)
        states: Tensor = output.hidden_states[-2]
        return (states, output[0]) if self.pooled else states


class InnerStates(nn.Module):
    """Token numbers to the states behind inner layers side by side, as Flux.2 is conditioned.

    Args:
        encoder: A language model of transformers without a head.
        layers: Numbers of the layers, from 1 on.
    """

    def __init__(self, encoder: Any, layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.read = tuple(layers)
        count = encoder.config.num_hidden_layers
        #: Parameters that nothing is computed from.
        self.unread = tuple(f"encoder.layers.{index}." for index in range(max(layers), count))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token numbers and their mask, int64 [B, L], to float [B, L, layers * D]."""
        states = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return torch.cat([states[layer] for layer in self.read], dim=-1)


class ImageDecoder(nn.Module):
    """Latents as the scheduler leaves them to an image in -1..1.

    Args:
        vae: `AutoencoderKL`, `AutoencoderTiny` or `VQModel`.
        shifted: Whether its `shift_factor` is used, as pipelines of flow matching do.
        normalised: Whether its `latents_mean` and `latents_std` are used if it has both, as
            StableDiffusionXLPipeline does. Other pipelines pass over what the VAE says of them.
    """

    #: Parameters of the other half.
    unread = ("vae.encoder.", "vae.quant_conv.")

    def __init__(self, vae: Any, *, shifted: bool = False, normalised: bool = False) -> None:
        super().__init__()
        self.vae = vae
        config = vae.config
        self.shift = float(config.get("shift_factor") or 0.0) if shifted else 0.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.mean: Tensor | None
        self.std: Tensor | None
        has_statistics = normalised and mean is not None and std is not None
        self.register_buffer("mean", _channels(mean) if has_statistics else None)
        self.register_buffer("std", _channels(std) if has_statistics else None)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to images [B, channels, H, W]."""
        if self.mean is not None and self.std is not None:
            latents = latents * self.std / self.scale + self.mean
        else:
            latents = latents / self.scale
        if self.shift:
            latents = latents + self.shift
        image: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return image


class ImageEncoder(nn.Module):
    """An image to mean and standard deviation of its latents, both in the scheduler's scale.

    The program is deterministic; the runner draws `mean + std * noise` with its own generator. A
    tiny VAE's latents have no deviation.

    Args:
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        scaled: Whether latents are scaled as the scheduler's are.
        normalised: Whether its `latents_mean` and `latents_std` are used if it has both, as
            StableDiffusionXLImg2ImgPipeline does. Other pipelines pass over them.
    """

    #: Parameters of the other half.
    unread = ("vae.decoder.", "vae.post_quant_conv.")

    def __init__(self, vae: Any, *, scaled: bool = True, normalised: bool = False) -> None:
        super().__init__()
        self.vae = vae
        config = vae.config
        self.scale = float(config.get("scaling_factor") or 1.0) if scaled else 1.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.mean: Tensor | None
        self.std: Tensor | None
        has_statistics = normalised and scaled and mean is not None and std is not None
        self.register_buffer("mean", _channels(mean) if has_statistics else None)
        self.register_buffer("std", _channels(std) if has_statistics else None)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it returns."""
        return ("mean", "std") if hasattr(self.vae, "quant_conv") else ("mean",)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Encode images in -1..1 [B, 3, H, W] to mean and deviation, both [B, C, h, w]."""
        encoded = self.vae.encode(image)
        if not hasattr(encoded, "latent_dist"):
            mean: Tensor = self._normalised(encoded.latents)
            return mean
        posterior = encoded.latent_dist
        return self._normalised(posterior.mean), self._spread(posterior.std)

    def _normalised(self, latents: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            return (latents - self.mean) * self.scale / self.std
        return latents * self.scale

    def _spread(self, deviation: Tensor) -> Tensor:
        return deviation * self.scale if self.std is None else deviation * self.scale / self.std


def _channels(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
