"""What stands beside a denoiser in its pipeline's folder: text encoders, prompts, and a VAE.

A folder of `quantize` holds the denoiser alone; the rest stays where it was, and is loaded for as
long as it is needed: the text encoders until the prompts are encoded, the VAE for a decoding.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.errors import ArtifactError, ConfigError, first_line
from mpqdm_fx.graph.nested import concatenate
from mpqdm_fx.io.folders import MANIFEST, MODEL_CONFIG
from mpqdm_fx.io.progress import stage
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.model.folder import open_folder
from mpqdm_fx.pipelines.conditions import (
    Call,
    Halves,
    default_guidance,
    encode_prompts,
    encodes_alone,
    with_numbers,
)
from mpqdm_fx.pipelines.families.registry import is_supported
from mpqdm_fx.pipelines.folder import INDEX, load_model, load_pipeline, read_index
from mpqdm_fx.pipelines.latent_scaling import latent_scaling
from mpqdm_fx.pipelines.parts import ImageDecoder
from mpqdm_fx.pipelines.prompts import DEFAULT_PROMPTS
from mpqdm_fx.sources.denoisers import SOURCE, origin_of
from mpqdm_fx.sources.source import Source

__all__ = [
    "PipelineComponents",
    "as_drawn",
    "as_recorded",
    "in_pipeline",
    "is_drawn_by_pipeline",
    "is_in_pipeline",
]

logger = logging.getLogger(__name__)

_ENCODERS = ("text_encoder", "text_encoder_2")
_DECODERS = ("vae", "vqvae")
_DECODED = 4  # images at once: a decoder's activations are many times its latents
_SIZES = 6  # original, crop and target of SDXL; its refiner has four and a score
_NEGATIVE_SCORE = 2.5  # of the refiner's unconditional half, diffusers' default


class PipelineComponents:
    """The other components of the pipeline that a denoiser is part of.

    Args:
        root: The pipeline's folder.
        source: The denoiser, with its scheduler and the inputs that it takes.
        prompts: Runs take turns with them; None takes `DEFAULT_PROMPTS`.
        guidance: Guidance scale of runs, up to 1 for none; None takes the pipeline's default.
        variant: Variant of weight files, where a component has it.

    Raises:
        ConfigError: Prompts or guidance are given, and the pipeline encodes no text.
        ArtifactError: A component of a supported pipeline is missing or damaged.
    """

    def __init__(
        self,
        root: Path,
        source: Source,
        *,
        prompts: Sequence[str] | None = None,
        guidance: float | None = None,
        variant: str | None = None,
    ) -> None:
        self._root, self._variant = root, variant
        self._index = read_index(root)
        self._shape = source.sample_shape
        inputs = source.inputs
        assert inputs is not None  # a pipeline's denoiser is a model of diffusers
        self._width = inputs.config.get("time_cond_proj_dim")
        self._encoded: dict[str, Halves] = {}
        self.prompts: tuple[str, ...] = tuple(DEFAULT_PROMPTS if prompts is None else prompts)
        #: Why embeddings are random numbers; None if they are the text encoders'.
        self.unencoded = self._refusal(inputs.conditions(1, 0))
        if self.unencoded is not None:
            if prompts is not None or guidance is not None:
                raise ConfigError(f"{root}: {self.unencoded}; leave prompts and guidance out")
            self.prompts, self.scale = (), 1.0
        else:
            self.scale = default_guidance(self._class()) if guidance is None else guidance

    @property
    def guidance(self) -> float | None:
        """Weight of classifier-free guidance in runs; None calls the denoiser once a step."""
        return self.scale if self.scale > 1 and self._width is None and self.prompts else None

    @property
    def decodes(self) -> bool:
        """Whether samples are latents, and the pipeline's VAE is there to decode them."""
        return self._decoder() is not None

    @property
    def undecoded(self) -> str | None:
        """Why samples that are latents are not decoded; None if they are, or are pixels."""
        name = next((name for name in _DECODERS if self._has(name)), None)
        if name is None or self.decodes:
            return None
        owner = self._index.get("_class_name")
        if not (self._root / name).is_dir():
            return f"the {owner}'s folder lacks its {name}"
        return f"the {owner}'s {name} does not decode {self._shape[0]} channels"

    @property
    def context_length(self) -> int | None:
        """Tokens of an encoded prompt; None where nothing encodes them."""
        if not self.prompts:
            return None
        plain, _ = self._encoded[self.prompts[0]]
        return int(plain["encoder_hidden_states"].shape[1])

    def halves(self, base: Mapping[str, Any], count: int, *, unseen: bool = False) -> Halves:
        """Conditions of so many runs, with the prompts and without them.

        Args:
            base: Conditions where the pipeline has none.
            count: Runs.
            unseen: Take turns from the last prompt backwards: those that were not calibrated on.
        """
        if not self.prompts:
            return dict(base), dict(base)
        turns = reversed(self.prompts) if unseen else self.prompts
        chosen = list(islice(cycle(turns), count))
        self._encode(chosen)
        plain, negative = zip(*(self._encoded[prompt] for prompt in chosen), strict=True)
        halves = with_numbers(
            (concatenate(plain), concatenate(negative)),
            size=self._size(base),
            guidance=self.scale,
            guidance_width=self._width,
        )
        return _over(base, halves[0]), _over(_without_score(base), halves[1])

    def pictures(self, samples: Tensor) -> Tensor | None:
        """Latents as the pipeline's VAE decodes them, [N, channels, H, W]; None if it has none.

        Args:
            samples: [N, C, h, w], as the scheduler leaves them.
        """
        entry = self._decoder()
        if entry is None:
            return None
        scaling = latent_scaling(self._class())
        decoder = ImageDecoder(
            load_model(self._root / entry[0], self._variant),
            shifted=scaling.shifted,
            normalised=scaling.normalised,
        ).eval()
        images = []
        with torch.no_grad(), stage("decoding", len(samples), unit="picture") as advance:
            for rows in torch.split(samples.float(), _DECODED):
                images.append(decoder(rows))
                advance(len(rows))
        return torch.cat(images)

    def _refusal(self, base: Mapping[str, Any]) -> str | None:
        """Why the pipeline's text encoders cannot condition the denoiser, if they cannot."""
        if not isinstance(base.get("encoder_hidden_states"), Tensor):
            return "the denoiser takes no text"
        name = str(self._index.get("_class_name"))
        encoders = [encoder for encoder in _ENCODERS if self._has(encoder)]
        if not encoders:
            return f"the {name} has no text encoder"
        missing = [encoder for encoder in encoders if not (self._root / encoder).is_dir()]
        if missing:
            return f"the {name}'s folder lacks its {missing[0]}"
        if not encodes_alone(self._class()):
            return f"a {name} has a way of its own to encode prompts"
        try:
            self._encode(self.prompts[:1])
        except ArtifactError as error:
            if is_supported(name):
                raise
            return f"the {name}'s text encoder cannot be used ({error})"
        halves = self._encoded[self.prompts[0]]
        widths, expected = _widths(halves[0]), _widths(base)
        if widths == expected:
            return None
        return (
            f"the {name}'s prompts have embeddings of {widths} numbers, the denoiser takes "
            f"{expected}"
        )

    def _encode(self, prompts: Sequence[str]) -> None:
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if not missing:
            return
        logger.info("encoding %d prompts", len(missing))
        with stage("encoding prompts", len(missing), unit="prompt") as advance:
            self._encode_all(missing, advance)

    def _encode_all(self, prompts: Sequence[str], advance: Callable[[], None]) -> None:
        pipeline = load_pipeline(
            self._root, self._index, variant=self._variant,
            leave_out=lambda part: not part.startswith(("text_encoder", "tokenizer", "scheduler")),
        )  # fmt: skip
        for prompt in prompts:
            try:
                self._encoded[prompt] = encode_prompts(pipeline, [prompt])
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise ArtifactError(
                    f"{self._root}: {self._index['_class_name']}.encode_prompt failed: "
                    f"{first_line(error)}"
                ) from error
            advance()

    def _class(self) -> Any:
        diffusers: Any = importlib.import_module("diffusers")
        return getattr(diffusers, str(self._index.get("_class_name")), None)

    def _has(self, component: str) -> bool:
        return self._index.get(component) not in (None, [None, None])

    def _decoder(self) -> tuple[str, Mapping[str, Any]] | None:
        """Name and config of the decoder, if it takes what the scheduler leaves."""
        for name in _DECODERS:
            if self._has(name) and (self._root / name).is_dir():
                config = read_json(self._root / name / MODEL_CONFIG, finite=False)
                return (name, config) if config.get("latent_channels") == self._shape[0] else None
        return None

    def _size(self, base: Mapping[str, Any]) -> tuple[int, int] | None:
        """Height and width in pixels; None where the denoiser is told no six sizes (SDXL)."""
        sizes, decoder = base.get("added_cond_kwargs", {}).get("time_ids"), self._decoder()
        if sizes is None or sizes.shape[1] != _SIZES or decoder is None:
            return None
        scale = 2 ** (len(decoder[1]["block_out_channels"]) - 1)
        return scale * self._shape[1], scale * self._shape[2]


def in_pipeline(
    source: Source,
    *,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
) -> Source:
    """A source with the other components of its pipeline, where it comes from one.

    Args:
        source: The denoiser.
        model: Its pipeline's folder, if not what the source is called.
        prompts: As of `PipelineComponents`.
        guidance: As of `PipelineComponents`.

    Raises:
        ConfigError: Prompts or guidance are given for what has no text encoder.
        ArtifactError: See `PipelineComponents`.
    """
    root = Path(model or source.name)
    if source.inputs is None or not source.inputs.is_denoiser or not (root / INDEX).is_file():
        if prompts is not None or guidance is not None:
            raise ConfigError(
                f"{root} is no pipeline with a text encoder; leave prompts and guidance out"
            )
        return source
    components = PipelineComponents(
        root, source, prompts=prompts, guidance=guidance, variant=source.variant
    )
    length = components.context_length
    source = source if length is None else source.with_context(length)
    return replace(source, components=components)


def as_recorded(
    source: Source,
    folder: Path,
    *,
    model: str | None = None,
    prompts: Sequence[str] | None = None,
    guidance: float | None = None,
) -> Source:
    """A source with the pipeline that a folder's model came from, and what it was calibrated on.

    Where the pipeline is gone the source stays what it is.

    Args:
        source: The denoiser, float or not.
        folder: Folder written by `quantize`.
        model: Where the pipeline is, if not where the folder says.
        prompts: In the place of the folder's.
        guidance: In the place of the folder's.

    Raises:
        ConfigError: Prompts or guidance are given, and there is no text encoder for them.
        ArtifactError: See `PipelineComponents`.
    """
    if prompts is None and guidance is None and not is_in_pipeline(folder, model):
        return source
    origin = origin_of(folder, model)
    place = model or origin.model
    return in_pipeline(
        source,
        model=place,
        prompts=origin.prompts if prompts is None else prompts,
        guidance=origin.guidance if guidance is None else guidance,
    )


def is_in_pipeline(folder: Path, model: str | None = None) -> bool:
    """Whether a folder's model came from a pipeline that is there; nothing is loaded.

    Args:
        folder: Folder written by `quantize`.
        model: Where the pipeline is, if not where the folder says.
    """
    has_source = model is not None or SOURCE in open_folder(folder).files
    return has_source and (Path(model or origin_of(folder).model) / INDEX).is_file()


def is_drawn_by_pipeline(name: str) -> bool:
    """Whether `as_drawn` finds a pipeline; nothing is loaded.

    Args:
        name: As of `as_drawn`.
    """
    return (
        is_in_pipeline(Path(name)) if _says_origin(Path(name)) else (Path(name) / INDEX).is_file()
    )


def _says_origin(folder: Path) -> bool:
    return (folder / MANIFEST).exists() and SOURCE in open_folder(folder).files


def as_drawn(
    source: Source, name: str, *, prompts: Sequence[str] | None, guidance: float | None
) -> Source:
    """What `open_denoiser` gave, with the pipeline that it belongs to; see `as_recorded`.

    Args:
        source: The denoiser.
        name: A folder written by `quantize`, or a model's name.
        prompts: To draw; None takes what the folder was calibrated on.
        guidance: Guidance scale; None takes what the folder was calibrated with.
    """
    if _says_origin(Path(name)):
        return as_recorded(source, Path(name), prompts=prompts, guidance=guidance)
    return in_pipeline(source, prompts=prompts, guidance=guidance)


def _over(base: Mapping[str, Any], conditions: Call) -> Call:
    """Conditions of the pipeline in the place of made ones; the others stay."""
    merged = {**base, **conditions}
    if "added_cond_kwargs" in conditions:
        merged["added_cond_kwargs"] = {
            **base.get("added_cond_kwargs", {}), **conditions["added_cond_kwargs"],
        }  # fmt: skip
    return merged


def _without_score(base: Mapping[str, Any]) -> Mapping[str, Any]:
    """Conditions of the unconditional half: SDXL's refiner is told a low aesthetic score."""
    times = base.get("added_cond_kwargs", {}).get("time_ids")
    if times is None or times.shape[1] != _SIZES - 1:
        return base
    times = times.clone()
    times[:, -1] = _NEGATIVE_SCORE
    return {**base, "added_cond_kwargs": {**base["added_cond_kwargs"], "time_ids": times}}


def _widths(conditions: Mapping[str, Any]) -> list[int]:
    """Widths of the text's embeddings, and of the pooled one where there is one."""
    pooled = conditions.get("added_cond_kwargs", {}).get("text_embeds")
    embeddings = (conditions["encoder_hidden_states"], pooled)
    return [tensor.shape[-1] for tensor in embeddings if isinstance(tensor, Tensor)]
