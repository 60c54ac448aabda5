"""From a model's config to the inputs of one call: every class and setting of `config_fields`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.sources.config_fields import check_fields
from mpqdm_fx.sources.input_parts import (
    CONTEXT_LENGTH,
    Draw,
    Named,
    added,
    context,
    gated,
    guidance,
    labels,
    sizes,
    unknown,
)
from mpqdm_fx.sources.transformer_inputs import (
    TEXT_LENGTHS,
    TRANSFORMER_CONDITIONS,
    TRANSFORMER_RULES,
)

__all__ = ["ModelInputs"]

Config = Mapping[str, Any]

_T5_LENGTH = 128
_USUAL_FRAMES = 16
_CASCADE_SIDE = 24


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """The inputs that a diffusers model takes, by its class and config.

    Attributes:
        class_name: Name of the class.
        config: All of its settings.
        text_width: Width of the pooled text of SDXL's kind, where the pipeline's folder says it.
        aesthetic: Whether its sizes are those of SDXL's refiner, with an aesthetic score; None
            where the folder does not say.
        context_length: Tokens of a text; None is as many as the class's pipeline has.

    Raises:
        ConfigError: The class or a setting is unknown, or settings contradict each other.
    """

    class_name: str
    config: Config = field(repr=False)
    text_width: int | None = None
    aesthetic: bool | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.context_length is None:
            usual = TEXT_LENGTHS.get(self.class_name, CONTEXT_LENGTH)
            object.__setattr__(self, "context_length", usual)
        check_fields(self.class_name, self.config)

    @property
    def is_denoiser(self) -> bool:
        """Whether it is called with a noisy image, a timestep and conditions."""
        return self.class_name in _CONDITIONS

    def example(self, *, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """Random keyword arguments of one call.

        Args:
            batch: Batch size.
            seed: Seed of the random values.
        """
        return self._drawn(_RULES[self.class_name], batch, seed)

    def conditions(self, count: int, seed: int) -> dict[str, Any]:
        """Seeded conditions of so many samples: all but the sample and the timestep.

        Class labels take turns.

        Args:
            count: Number of samples.
            seed: Seed of the random values.

        Raises:
            ConfigError: The model is not called with a noisy image and a timestep.
        """
        rule = _CONDITIONS.get(self.class_name)
        if rule is None:
            raise ConfigError(
                f"denoising runs of a {self.class_name} need more than noise, timesteps and "
                f"embeddings; use the Python interface: mpqdm_fx.quantize(model, config, calls)"
            )
        return self._drawn(rule, count, seed)

    def _drawn(self, rule: Callable[[Draw], Named], batch: int, seed: int) -> dict[str, Any]:
        draw = Draw(
            self.class_name,
            self.config,
            text_width=self.text_width,
            aesthetic=self.aesthetic,
            context_length=self.context_length or CONTEXT_LENGTH,
            batch=batch,
            seed=seed,
        )
        try:
            return _nested(rule(draw))
        except ConfigError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"no inputs can be made of the config of this {self.class_name}: {error}"
            ) from None


def _nested(named: Named) -> dict[str, Any]:
    """Dotted names as nested dicts."""
    nested: dict[str, Any] = {}
    for name, value in named:
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def _unet_1d(draw: Draw) -> Named:
    yield "sample", draw.normal(draw.config["in_channels"], int(draw.config["sample_size"]))
    yield "timestep", draw.timestep()


def _unet_2d(draw: Draw) -> Named:
    yield "sample", draw.normal(draw.config["in_channels"], *draw.sides())
    yield "timestep", draw.timestep()
    yield from labels(draw)


def _condition(draw: Draw) -> Named:
    # the hint of a control image becomes channels inside the model
    hint = 4 if draw.config["addition_embed_type"] == "image_hint" else 0
    yield "sample", draw.normal(draw.config["in_channels"] - hint, *draw.sides())
    yield "timestep", draw.timestep()
    yield from _condition_extras(draw)


def _condition_extras(draw: Draw) -> Named:
    yield from labels(draw)
    yield from context(draw)
    yield from guidance(draw)
    yield from added(draw)
    yield from gated(draw)


def _kandinsky_3(draw: Draw) -> Named:
    yield "sample", draw.normal(draw.config["in_channels"], *draw.sides())
    yield "timestep", draw.timestep()
    yield from _kandinsky_3_extras(draw)


def _kandinsky_3_extras(draw: Draw) -> Named:
    yield "encoder_hidden_states", draw.normal(_T5_LENGTH, draw.config["encoder_hid_dim"])
    lengths = torch.randint(8, _T5_LENGTH + 1, (draw.batch, 1), generator=draw.generator)
    yield "encoder_attention_mask", (torch.arange(_T5_LENGTH) < lengths).float()


def _video(draw: Draw) -> Named:
    yield "sample", draw.normal(draw.config["in_channels"], _USUAL_FRAMES, *draw.sides())
    yield "timestep", draw.timestep()


def _unet_3d(draw: Draw) -> Named:
    yield from _video(draw)
    yield (
        "encoder_hidden_states",
        draw.normal(draw.context_length, draw.config["cross_attention_dim"]),
    )
    yield from guidance(draw)


def _motion(draw: Draw) -> Named:
    yield from _video(draw)
    if draw.config["encoder_hid_dim_type"] is not None:
        raise unknown(draw, "encoder_hid_dim_type")
    if draw.config["addition_embed_type"] not in (None, "text_time"):
        raise unknown(draw, "addition_embed_type")
    states = draw.normal(draw.context_length, draw.config["cross_attention_dim"])
    yield "encoder_hidden_states", states.repeat_interleave(_USUAL_FRAMES, dim=0)
    yield from guidance(draw)
    yield from added(draw)


def _spatio_temporal(draw: Draw) -> Named:
    config = draw.config
    yield "sample", draw.normal(config["num_frames"], config["in_channels"], *draw.sides())
    yield "timestep", draw.timestep()
    yield "encoder_hidden_states", draw.normal(1, config["cross_attention_dim"])
    count = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    # frames a second less one, strength of the motion, noise of the picture (Stable Video)
    row = torch.tensor([[6.0, 127.0, 0.02]]).repeat(draw.batch, 1 + count // 3)
    yield "added_time_ids", row[:, :count]


def _i2vgen(draw: Draw) -> Named:
    yield from _video(draw)
    yield "fps", torch.full((draw.batch,), 16, dtype=torch.int64)
    latents = draw.normal(draw.config["in_channels"], _USUAL_FRAMES, *draw.sides())
    yield "image_latents", latents
    width = draw.config["cross_attention_dim"]
    yield "image_embeddings", draw.normal(width)
    yield "encoder_hidden_states", draw.normal(draw.context_length, width)


def _cascade(draw: Draw) -> Named:
    config = draw.config
    side = _CASCADE_SIDE * config["patch_size"]
    yield "sample", draw.normal(config["in_channels"], side, side)
    yield "timestep_ratio", torch.full((draw.batch,), 0.5)
    yield "clip_text_pooled", draw.normal(1, config["clip_text_pooled_in_channels"])
    if config["clip_text_in_channels"]:
        yield "clip_text", draw.normal(draw.context_length, config["clip_text_in_channels"])
    if config["clip_image_in_channels"]:
        yield "clip_img", draw.normal(1, config["clip_image_in_channels"])
    if config["effnet_in_channels"]:
        yield "effnet", draw.normal(config["effnet_in_channels"], _CASCADE_SIDE, _CASCADE_SIDE)


def _uvit(draw: Draw) -> Named:
    config = draw.config
    shape = (draw.batch, *draw.sides())
    yield "input_ids", torch.randint(config["vocab_size"], shape, generator=draw.generator)
    yield "encoder_hidden_states", draw.normal(draw.context_length, config["encoder_hidden_size"])
    yield "pooled_text_emb", draw.normal(config["cond_embed_dim"])
    count = config["micro_cond_embed_dim"] // config["micro_cond_encode_dim"]
    yield "micro_conds", sizes(draw, count)


def _controlled(draw: Draw) -> Named:
    """ControlNet-XS with the UNet that it controls, which has four channels."""
    config = draw.config
    yield "sample", draw.normal(4, *draw.sides())
    yield "timestep", draw.timestep()
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    yield "encoder_hidden_states", draw.normal(draw.context_length, width)
    scale = 2 ** (len(config["ctrl_conditioning_embedding_out_channels"]) - 1)
    sides = (scale * side for side in draw.sides())
    yield "controlnet_cond", draw.normal(config["ctrl_conditioning_channels"], *sides).clamp(0, 1)
    yield from guidance(draw)
    yield from added(draw)


_RULES: Mapping[str, Callable[[Draw], Named]] = {
    "UNet1DModel": _unet_1d,
    "UNet2DModel": _unet_2d,
    "UNet2DConditionModel": _condition,
    "DreamLiteUNetModel": _condition,
    "UNet3DConditionModel": _unet_3d,
    "UNetMotionModel": _motion,
    "UNetSpatioTemporalConditionModel": _spatio_temporal,
    "I2VGenXLUNet": _i2vgen,
    "Kandinsky3UNet": _kandinsky_3,
    "StableCascadeUNet": _cascade,
    "UVit2DModel": _uvit,
    "UNetControlNetXSModel": _controlled,
    **TRANSFORMER_RULES,
}

#: Classes that are called with a noisy image, a timestep and conditions.
_CONDITIONS: Mapping[str, Callable[[Draw], Named]] = {
    "UNet2DModel": labels,
    "UNet2DConditionModel": _condition_extras,
    "DreamLiteUNetModel": _condition_extras,
    "Kandinsky3UNet": _kandinsky_3_extras,
    **TRANSFORMER_CONDITIONS,
}
