"""Which pipelines can be exported, how one is loaded, and what its parts are."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.samplers import model_convention
from mpqdm_fx.calibration.schedulers import check_scheduler
from mpqdm_fx.errors import ConfigError
from mpqdm_fx.io.folders import refuse_other_results
from mpqdm_fx.pipelines.adapters import refuse_adapters
from mpqdm_fx.pipelines.families.family import Family
from mpqdm_fx.pipelines.families.registry import family_of
from mpqdm_fx.pipelines.folder import load_pipeline, read_index
from mpqdm_fx.pipelines.loops.loop import Loop
from mpqdm_fx.pipelines.parts import Part
from mpqdm_fx.records.validation import Count, check_value
from mpqdm_fx.sources.model_names import BUNDLED, is_folder, unknown_model

__all__ = ["Layout", "Size", "layout_of", "open_pipeline", "size_text"]

logger = logging.getLogger(__name__)

Size = tuple[Count, ...]
"""Height and width of an image in pixels, or the length of a sound in samples of a channel."""

#: What a size is, and how it is written, by its numbers.
_SIDES = {1: "its length", 2: "height and width"}
_FORMS = {1: "the samples of a channel", 2: "HEIGHTxWIDTH in pixels"}

# Components that a program has no use for; they need not be in the folder either.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


def size_text(size: Size) -> str:
    """A size as `--size` takes it, for example `512x768`."""
    return "x".join(map(str, size))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pipeline as its parts and the numbers that hold them together.

    Attributes:
        pipeline: The diffusers pipeline, or a copy of it in float32 and evaluation mode.
        class_name: Its class.
        family: What it is made of, and how it draws.
        parts: In the order in which they run.
        tokenizers: By the name of their folder.
        latent_channels: Channels of what the scheduler steps on.
        scale: Pixels of an image, or samples of a sound, for one of the latents, per side.
        multiple: What heights and widths, or lengths, are multiples of.
        default_size: Size that the denoiser was trained for.
        settings: What the family's loop must know of the models.
    """

    pipeline: Any
    class_name: str
    family: Family
    parts: Mapping[str, Part]
    tokenizers: Mapping[str, Any]
    latent_channels: int
    scale: int
    multiple: int
    default_size: Size
    settings: Mapping[str, Any]

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser."""
        return self.parts["denoiser"].module

    @property
    def convention(self) -> CallingConvention:
        """How the denoiser is called along a schedule."""
        return replace(model_convention(self.denoiser), eta=self.family.eta)

    @property
    def loop(self) -> type[Loop]:
        """How it draws."""
        return self.family.loop

    def check_sizes(self, sizes: Sequence[Size] | None) -> tuple[Size, ...]:
        """The sizes to export, by default the one that the denoiser was trained for.

        Raises:
            ConfigError: A size is no multiple of the decoder's scale, or given twice.
        """
        check_value(sizes, Sequence[Size] | None, "sizes")
        chosen = tuple(sizes or (self.default_size,))
        count = len(self.default_size)
        for size in chosen:
            text = size_text(size)
            if len(size) != count:
                raise ConfigError(f"size {text}: a {self.class_name}'s size is {_FORMS[count]}")
            if any(side % self.multiple for side in size):
                multiples = "multiples" if count > 1 else "a multiple"
                raise ConfigError(
                    f"size {text}: {_SIDES[count]} must be {multiples} of {self.multiple}, for the "
                    f"pipeline's decoder and denoiser"
                )
        if len(set(chosen)) < len(chosen):
            raise ConfigError(f"sizes {list(chosen)}: each size once")
        return chosen


def open_pipeline(source: Any, *, stored: bool = False) -> Any:
    """Load a pipeline from its folder; a pipeline object is returned as it is.

    Args:
        source: Folder written by `save_pretrained`, or a pipeline.
        stored: Leave the weights of large text encoders in the folder's files, from which they are
            read layer by layer.

    Raises:
        ConfigError: There is no such folder, or its class is not supported.
        ArtifactError: The folder lacks a component or is damaged.
    """
    if not isinstance(source, (str, Path)):
        family_of(type(source).__name__)
        return source
    root = Path(source)
    if not is_folder(str(source)) and str(source) != BUNDLED:
        raise unknown_model(str(source))
    refuse_other_results(root)
    index = read_index(root)
    family_of(str(index.get("_class_name")))
    if index.get("safety_checker") not in (None, [None, None]):
        _say_unchecked()
    return load_pipeline(root, index, leave_out=lambda part: part in _UNUSED, stored=stored)


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
    family = family_of(name)
    check_scheduler(getattr(pipeline, "scheduler", None))
    refuse_adapters(dict(pipeline.components))
    family.check(pipeline)
    for key, component in pipeline.components.items():
        if isinstance(component, nn.Module) and any(p.is_cuda for p in component.parameters()):
            raise ConfigError(
                f'{key} is on a GPU: call pipeline.to("cpu"); with device="cuda" the layers are '
                f"solved there"
            )
    if getattr(pipeline, "safety_checker", None) is not None:
        _say_unchecked()
    latents = family.latents(pipeline)
    return Layout(
        pipeline=pipeline,
        class_name=name,
        family=family,
        parts={part.name: part for part in family.parts(pipeline)},
        tokenizers={
            key: getattr(pipeline, key)
            for key in family.tokenizers
            if getattr(pipeline, key, None) is not None
        },
        latent_channels=latents.channels,
        scale=latents.scale,
        multiple=latents.multiple,
        default_size=tuple(side * latents.scale for side in latents.sides),
        settings=family.settings(pipeline),
    )
