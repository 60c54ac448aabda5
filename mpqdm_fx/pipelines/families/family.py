"""What a family of pipelines says of itself, so that `export` can take it apart.

A pipeline of one's own, or one that is not there yet, is a `Family` and a `Loop`, each a small
file, and one call of `register_family`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mpqdm_fx.calibration.conventions import convention_of
from mpqdm_fx.capture.entry import unwrap
from mpqdm_fx.capture.foreign_models import check_model
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.pipelines.loops.loop import Loop, predicts_flow
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS

__all__ = [
    "ONE_ENCODER",
    "PICTURE_DECODERS",
    "TWO_ENCODERS",
    "Family",
    "Latents",
    "denoiser_part",
    "ready",
    "sides_of",
    "sized_part",
    "transformer_latents",
]

_USUAL_SIDE = 64  # of latents, where a model does not say


#: VAEs of pictures, full and tiny, whose decoders take latents and nothing more.
PICTURE_DECODERS = ("AutoencoderKL", "AutoencoderTiny")
#: Components of pipelines around a transformer that one text encoder conditions.
ONE_ENCODER = ("transformer", "scheduler", "text_encoder", "tokenizer", "vae")
#: Components of pipelines around a transformer that two text encoders condition.
TWO_ENCODERS = (
    "transformer",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "vae",
)


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the scheduler steps on.

    Attributes:
        channels: Their channels.
        scale: Pixels for one of them, per side; of sounds samples in each channel.
        multiple: What heights and widths in pixels, or lengths in samples, are multiples of.
        sides: Height and width of those that the denoiser was trained on; of sounds the length.
    """

    channels: int
    scale: int
    multiple: int
    sides: tuple[int, ...]


class Family(ABC):
    """Pipelines that are made of the same parts and draw in the same way."""

    #: How they draw; its file becomes a file of exported folders.
    loop: ClassVar[type[Loop]]
    #: Components that must be there.
    needed: ClassVar[tuple[str, ...]] = ("unet", "scheduler")
    #: Classes of decoders that the parts are made of; empty: any that it may have.
    decoders: ClassVar[tuple[str, ...]] = ()
    #: What the pipeline tells schedulers that take an eta; None: nothing, and theirs holds.
    eta: ClassVar[float | None] = 0.0
    #: Tokenizers, those of them that a pipeline has.
    tokenizers: ClassVar[tuple[str, ...]] = ()
    #: Prompts to calibrate on where none are given.
    prompts: ClassVar[tuple[str, ...]] = DEFAULT_PROMPTS

    @property
    def kind(self) -> str:
        """Name of the loop's file."""
        return self.loop.__module__.rpartition(".")[2]

    def check(self, pipeline: Any) -> None:
        """Refuse a pipeline that lacks a component, or is made otherwise than others of its class.

        Args:
            pipeline: It.

        Raises:
            ConfigError: Says what is missing or other, and what to do.
        """
        for component in self.needed:
            if getattr(pipeline, component, None) is None:
                raise ConfigError(
                    f"the {type(pipeline).__name__} has no {component}; load it with one"
                )
        for component in ("vae", "vqvae"):
            decoder = getattr(pipeline, component, None)
            names = {kind.__name__ for kind in type(decoder).__mro__}
            if decoder is not None and self.decoders and not names.intersection(self.decoders):
                raise ConfigError(
                    f"{component}, of class {type(decoder).__name__}, decodes in a way of its "
                    f"own; only {' and '.join(self.decoders)} are supported"
                )

    @abstractmethod
    def parts(self, pipeline: Any) -> Sequence[Part]:
        """The networks that become programs, in running order."""

    @abstractmethod
    def latents(self, pipeline: Any) -> Latents:
        """What the scheduler steps on."""

    def settings(self, pipeline: Any) -> Mapping[str, Any]:
        """What the loop must know, as `Loop.settings` lists it; plain JSON types."""
        scheduler = pipeline.scheduler
        return {
            "prediction_type": scheduler.config.get("prediction_type", "epsilon"),
            "flow": predicts_flow(scheduler),
        }


def ready(module: nn.Module) -> Any:
    """The module if it computes in float32 and evaluation mode, else such a copy.

    Args:
        module: A component of a pipeline.

    Raises:
        TraceError: It is offloaded, cast layer by layer, or quantized already.
    """
    module = unwrap(module)
    check_model(module)
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floating <= {torch.float32} and not any(m.training for m in module.modules()):
        return module
    return copy.deepcopy(module).float().eval()


def sized_part(
    name: str, module: nn.Module, outputs: tuple[str, ...], *, stepped: tuple[str, ...] = ()
) -> Part:
    """A part with a method for each image size.

    Args:
        name: Its name.
        module: In evaluation mode, or a new wrapper of such a module.
        outputs: As of `Part`.
        stepped: As of `Part`.
    """
    return Part(name=name, module=module.eval(), outputs=outputs, sized=True, stepped=stepped)


def denoiser_part(model: Any) -> Part:
    """A pipeline's UNet or transformer as its denoiser.

    Args:
        model: A model of diffusers.
    """
    convention = convention_of(type(model).__name__, model.config)
    stepped = (convention.sample, convention.timestep)
    return sized_part("denoiser", ready(model), ("noise_pred",), stepped=stepped)


def transformer_latents(pipeline: Any, *, scale: int | None = None) -> Latents:
    """What a transformer pipeline's scheduler steps on: sides are whole patches.

    Args:
        pipeline: It has a `transformer` and a `vae`.
        scale: Pixels for one of the latents; None: as a VAE of these blocks has it.
    """
    config = pipeline.transformer.config
    scale = scale or 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    return Latents(
        channels=int(config.in_channels),
        scale=scale,
        multiple=scale * int(config.patch_size),
        sides=sides_of(config),
    )


def sides_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a denoiser's latents, as its config says them.

    Args:
        config: It.
    """
    side = config.get("sample_size") or _USUAL_SIDE
    height, width = (side, side) if isinstance(side, int) else side
    return int(height), int(width)
