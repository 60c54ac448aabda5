"""Which pipelines can be exported, how one is loaded, and what its parts are."""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mpqdm_fx.calibration.schedulers import check_scheduler
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.capture.foreign_models import check_model
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.folders import refuse_other_results
from mpqdm_fx.pipelines.adapters import refuse_adapters
from mpqdm_fx.pipelines.folder import load_pipeline, read_index
from mpqdm_fx.pipelines.parts import (
    ImageDecoder,
    ImageEncoder,
    Part,
    PenultimateStates,
    TextEncoder,
)
from mpqdm_fx.records.validation import Count, check_value
from mpqdm_fx.sources.model_names import BUNDLED, unknown_model

__all__ = ["SUPPORTED", "Kind", "Layout", "Size", "layout_of", "open_pipeline"]

logger = logging.getLogger(__name__)

Kind = Literal["text_to_image", "inpainting", "unconditional"]
Size = tuple[Count, Count]
"""Height and width of an image in pixels."""

SUPPORTED: dict[str, Kind] = {
    "StableDiffusionPipeline": "text_to_image",
    "StableDiffusionXLPipeline": "text_to_image",
    "StableDiffusionInpaintPipeline": "inpainting",
    "DDPMPipeline": "unconditional",
    "DDIMPipeline": "unconditional",
    "LDMPipeline": "unconditional",
}

# Components that a program has no use for; they need not be in the folder either.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_INPAINTING_CHANNELS = 9
_USUAL_SIDE = 64  # of latents, where a model does not say


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pipeline as its parts and the numbers that hold them together.

    Attributes:
        pipeline: The diffusers pipeline, or a copy of it in float32 and evaluation mode.
        class_name: Its class.
        kind: What it draws from.
        parts: In the order in which they run.
        tokenizers: By the name of their folder.
        latent_channels: Channels of what the scheduler steps on.
        scale: Pixels of an image for one of the latents, per side.
        default_size: Size that the denoiser was trained for.
        settings: What the runner must know of the models: guidance embedding, zeroed negative
            prompts, prediction type.
    """

    pipeline: Any
    class_name: str
    kind: Kind
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, Any]
    latent_channels: int
    scale: int
    default_size: Size
    settings: Mapping[str, Any]

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.parts["denoiser"].module

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Shape of the latents of one image: channels, height, width."""
        return (self.latent_channels, size[0] // self.scale, size[1] // self.scale)

    def check_sizes(self, sizes: Sequence[Size] | None) -> tuple[Size, ...]:
        """The sizes to export, by default the one that the denoiser was trained for.

        Raises:
            ConfigError: A size is no multiple of the decoder's scale, or given twice.
        """
        check_value(sizes, Sequence[Size] | None, "sizes")
        chosen = tuple(sizes or (self.default_size,))
        for height, width in chosen:
            if height % self.scale or width % self.scale:
                raise ConfigError(
                    f"size {height}x{width}: height and width must be multiples of {self.scale}, "
                    f"the scale of the pipeline's decoder"
                )
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"sizes {list(chosen)}: each size once")
        return chosen


def open_pipeline(source: Any) -> Any:
    """Load a pipeline from its folder; a pipeline object is returned as it is.

    Args:
        source: Folder written by `save_pretrained`, or a pipeline.

    Raises:
        ConfigError: There is no such folder, or its class is not supported.
        ArtifactError: The folder lacks a component or is damaged.
    """
    if not isinstance(source, (str, Path)):
        _check_class(type(source).__name__)
        return source
    root = Path(source)
    if not root.is_dir() and str(source) != BUNDLED:
        raise unknown_model(str(source))
    refuse_other_results(root)
    index = read_index(root)
    _check_class(str(index.get("_class_name")))
    if index.get("safety_checker") not in (None, [None, None]):
        _say_unchecked()
    return load_pipeline(root, index, leave_out=lambda part: part in _UNUSED)


def _check_class(name: str) -> None:
    if name not in SUPPORTED:
        raise ConfigError(
            f"{name} cannot be exported; supported are {', '.join(SUPPORTED)}. The denoiser alone "
            f"of another pipeline can be quantized: mpqdm_fx.quantize"
        )


def _say_unchecked() -> None:
    logger.warning("the safety checker is not exported: check the images where they are shown")


def layout_of(pipeline: Any) -> Layout:
    """Take a pipeline apart.

    Args:
        pipeline: A supported pipeline; it is not changed.

    Raises:
        ConfigError: A component is missing or of a kind that is not supported, or carries an
            adapter; says what to do.
    """
    name = type(pipeline).__name__
    _check_class(name)
    check_scheduler(getattr(pipeline, "scheduler", None))
    refuse_adapters(dict(pipeline.components))
    kind = SUPPORTED[name]
    needed = ["unet", "scheduler"]
    needed += ["text_encoder", "tokenizer", "vae"] if kind != "unconditional" else []
    needed += ["text_encoder_2", "tokenizer_2"] if name == "StableDiffusionXLPipeline" else []
    needed += ["vqvae"] if name == "LDMPipeline" else []
    for component in needed:
        if getattr(pipeline, component, None) is None:
            raise ConfigError(f"the {name} has no {component}; load it with one")
    for key, component in pipeline.components.items():
        if isinstance(component, nn.Module) and any(p.is_cuda for p in component.parameters()):
            raise ConfigError(
                f'{key} is on a GPU: call pipeline.to("cpu"); with device="cuda" the layers are '
                f"solved there"
            )
    if getattr(pipeline, "safety_checker", None) is not None:
        _say_unchecked()
    unet = _ready(pipeline.unet)
    channels = int(unet.config.in_channels)
    if kind == "inpainting" and channels != _INPAINTING_CHANNELS:
        raise ConfigError(
            f"the UNet of this StableDiffusionInpaintPipeline takes {channels} channels; only "
            f"inpainting models with {_INPAINTING_CHANNELS} (latents, mask, masked image) are "
            f"supported"
        )
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    denoiser = _part("denoiser", unet, ("noise_pred",), stepped=("sample", "timestep"))
    parts = [*_text_parts(pipeline), denoiser]
    if vae is not None:
        vae = _ready(vae)
        parts.append(_part("vae_decoder", ImageDecoder(vae), ("image",)))
    if kind == "inpainting":
        parts.insert(0, _part("vae_encoder", ImageEncoder(vae), ("mean", "std")))
    side = unet.config.sample_size or _USUAL_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    return Layout(
        pipeline=pipeline,
        class_name=name,
        kind=kind,
        parts={part.name: part for part in parts},
        tokenizers={
            key: getattr(pipeline, key)
            for key in ("tokenizer", "tokenizer_2")
            if getattr(pipeline, key, None) is not None
        },
        latent_channels=channels if kind != "inpainting" else (channels - 1) // 2,
        scale=scale,
        default_size=(height * scale, width * scale),
        settings={
            "time_cond_proj_dim": unet.config.get("time_cond_proj_dim"),
            "time_ids": name == "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": bool(
                pipeline.config.get("force_zeros_for_empty_prompt", False)
            ),
            "prediction_type": pipeline.scheduler.config.get("prediction_type", "epsilon"),
        },
    )


def _text_parts(pipeline: Any) -> list[Part]:
    encoders = [
        (key, _ready(getattr(pipeline, key)))
        for key in ("text_encoder", "text_encoder_2")
        if getattr(pipeline, key, None) is not None
    ]
    for key, encoder in encoders:
        if getattr(encoder.config, "use_attention_mask", False):
            raise ConfigError(f"{key} wants an attention mask, which programs do not take")
    if type(pipeline).__name__ != "StableDiffusionXLPipeline":
        return [
            Part(name=key, module=TextEncoder(encoder).eval(), outputs=(_STATES,), sized=False)
            for key, encoder in encoders
        ]
    return [
        Part(
            name=key,
            module=PenultimateStates(encoder, pooled=pooled).eval(),
            outputs=(_STATES, "text_embeds") if pooled else (_STATES,),
            sized=False,
        )
        for (key, encoder), pooled in zip(encoders, (False, True), strict=True)
    ]


_STATES = "encoder_hidden_states"


def _part(
    name: str, module: nn.Module, outputs: tuple[str, ...], *, stepped: tuple[str, ...] = ()
) -> Part:
    # `eval` reaches models that are in evaluation mode already (`_ready`)
    return Part(name=name, module=module.eval(), outputs=outputs, sized=True, stepped=stepped)


def _ready(module: nn.Module) -> Any:
    """The module if it computes in float32 and evaluation mode, else such a copy.

    Raises:
        TraceError: It is offloaded, cast layer by layer, or quantized already.
    """
    module = unwrap(module)
    check_model(module)
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floating <= {torch.float32} and not any(m.training for m in module.modules()):
        return module
    return copy.deepcopy(module).float().eval()
