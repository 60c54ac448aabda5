"""The parts of a UNet's inputs: labels, texts, guidance, sizes, boxes, by the config's settings."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpqdm_fx.errors import ConfigError

__all__ = [
    "CONTEXT_LENGTH",
    "Draw",
    "Named",
    "added",
    "context",
    "gated",
    "guidance",
    "labels",
    "sizes",
    "unknown",
]

Named = Iterator[tuple[str, Any]]
"""Dotted names of arguments, and their values."""

CONTEXT_LENGTH = 77  # tokens of CLIP's text encoder, which most cross-attention UNets read
_USUAL_SIDE = 64  # of latents, where a config does not say
_CLIP_WIDTH = 1280  # of the pooled text of SDXL and of its refiner
_GLIGEN_BOXES = 30
_GUIDANCE_SCALES = (2.0, 12.0)
_AESTHETIC_SCORE = 6.0
_PIXELS = 8  # of an image for one of the latents, per side
_NOISE_LEVELS = 1000


class Draw:
    """A config, a batch and a stream of random numbers.

    Attributes:
        class_name: Name of the model's class.
        config: All of its settings.
        text_width: Width of the pooled text; None if nobody said.
        aesthetic: Whether sizes end with an aesthetic score; None if nobody said.
        context_length: Tokens of a text.
        batch: Batch size.
        generator: Of the random numbers.
    """

    def __init__(
        self,
        class_name: str,
        config: Mapping[str, Any],
        *,
        text_width: int | None,
        aesthetic: bool | None,
        context_length: int,
        batch: int,
        seed: int,
    ) -> None:
        self.class_name = class_name
        self.config = config
        self.text_width = text_width
        self.aesthetic = aesthetic
        self.context_length = context_length
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float [batch, *shape]."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def turns(self, count: int) -> Tensor:
        """0, 1, ..., count - 1, 0, 1, ...: int64 [batch]."""
        return torch.arange(self.batch) % count

    def timestep(self) -> Tensor:
        """A timestep in the middle, int64 [batch]."""
        return torch.full((self.batch,), 500, dtype=torch.int64)

    def sides(self) -> tuple[int, int]:
        """Height and width of a sample."""
        size = self.config.get("sample_size") or _USUAL_SIDE
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)


def labels(draw: Draw) -> Named:
    """Class labels: numbers, noise levels, or embeddings."""
    config = draw.config
    kind = config.get("class_embed_type")
    if kind is None:
        if config.get("num_class_embeds"):
            yield "class_labels", draw.turns(config["num_class_embeds"])
    elif kind == "timestep":
        yield "class_labels", draw.turns(_NOISE_LEVELS)
    elif kind == "identity":
        yield "class_labels", draw.normal(_time_width(draw))
    elif kind in ("projection", "simple_projection") and draw.class_name != "UNet2DModel":
        yield "class_labels", draw.normal(config["projection_class_embeddings_input_dim"])
    else:
        raise unknown(draw, "class_embed_type")


def _time_width(draw: Draw) -> int:
    """Width of the embedded timestep."""
    config = draw.config
    fourier = config["time_embedding_type"] == "fourier"
    scale = 2 if fourier and draw.class_name != "UNet2DModel" else 4
    return int(config.get("time_embedding_dim") or scale * config["block_out_channels"][0])


def context(draw: Draw) -> Named:
    """Text embeddings; None where nothing reads them, which the class wants to be told."""
    config = draw.config
    kind = config["encoder_hid_dim_type"]
    blocks = (*config["down_block_types"], config["mid_block_type"], *config["up_block_types"])
    attends = any("CrossAttn" in str(block) for block in blocks)
    if kind == "image_proj" or not (attends or config["addition_embed_type"] == "text"):
        yield "encoder_hidden_states", None
    elif kind in ("text_proj", "text_image_proj", "text_proj_rms"):
        yield "encoder_hidden_states", draw.normal(draw.context_length, config["encoder_hid_dim"])
    elif kind is None:
        width = _cross_width(draw)
        yield (
            "encoder_hidden_states",
            None if width is None else draw.normal(draw.context_length, width),
        )
    else:
        raise unknown(draw, "encoder_hid_dim_type")


def _cross_width(draw: Draw) -> int | None:
    """Width of the text; None if each block attends to itself (AudioLDM)."""
    width = draw.config["cross_attention_dim"]
    if isinstance(width, int):
        return width
    widths = list(width)
    if len(set(widths)) == 1:
        return int(widths[0])
    if widths == list(draw.config["block_out_channels"]):
        return None
    raise ConfigError(
        f"{draw.class_name}: cross_attention_dim {widths} asks for texts of several widths; "
        f"use the Python interface: mpqdm_fx.trace(model, example_inputs)"
    )


def guidance(draw: Draw) -> Named:
    """Embedded guidance scales (latent consistency models, Luo et al. 2023, section 4)."""
    width = draw.config.get("time_cond_proj_dim")
    if width is None:
        return
    low, high = _GUIDANCE_SCALES
    scales = low + (high - low) * torch.rand(draw.batch, generator=draw.generator)
    half = width // 2
    rates = torch.exp(torch.arange(half) * (-math.log(10000.0) / max(1, half - 1)))
    angles = 1000.0 * (scales[:, None] - 1) * rates
    waves = torch.cat([angles.sin(), angles.cos(), torch.zeros(draw.batch, width % 2)], dim=1)
    yield "timestep_cond", waves


def added(draw: Draw) -> Named:
    """What is added to the embedded timestep: pooled text, sizes, images."""
    config = draw.config
    kind = config.get("addition_embed_type")
    images = config.get("encoder_hid_dim_type") in ("image_proj", "text_image_proj")
    if kind == "text_time":
        times = _time_ids(draw)
        width = config["projection_class_embeddings_input_dim"]
        text = width - times.shape[1] * config["addition_time_embed_dim"]
        yield "added_cond_kwargs.text_embeds", draw.normal(text)
        yield "added_cond_kwargs.time_ids", times
    elif kind == "time" and draw.class_name == "DreamLiteUNetModel":
        count = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
        yield "added_cond_kwargs.time_ids", sizes(draw, count)
    elif kind == "text_image":
        width = config["cross_attention_dim"]
        yield "added_cond_kwargs.image_embeds", draw.normal(width)
        yield "added_cond_kwargs.text_embeds", draw.normal(width)
    elif kind in ("image", "image_hint"):
        yield "added_cond_kwargs.image_embeds", draw.normal(config["encoder_hid_dim"])
        if kind == "image_hint":
            height, width = (_PIXELS * side for side in draw.sides())
            yield "added_cond_kwargs.hint", draw.normal(3, height, width).clamp(-1, 1)
    elif kind not in (None, "text"):
        raise unknown(draw, "addition_embed_type")
    elif images:
        image = config["encoder_hid_dim_type"] == "image_proj"
        width = config["encoder_hid_dim" if image else "cross_attention_dim"]
        yield "added_cond_kwargs.image_embeds", draw.normal(width)


def _time_ids(draw: Draw) -> Tensor:
    """Six sizes in pixels (SDXL), or four and a score (its refiner)."""
    config = draw.config
    total = config["projection_class_embeddings_input_dim"]
    width = config["addition_time_embed_dim"]
    fits = [count for count in (6, 5) if total - count * width == (draw.text_width or _CLIP_WIDTH)]
    if draw.aesthetic is not None:
        count = 5 if draw.aesthetic else 6
    elif fits or draw.text_width is None:
        count = fits[0] if fits else 6
    else:
        raise ConfigError(
            f"{draw.class_name}: projection_class_embeddings_input_dim {total} is not "
            f"{draw.text_width} numbers of the text and five or six sizes of {width}"
        )
    if total - count * width < 1:
        raise ConfigError(
            f"{draw.class_name}: projection_class_embeddings_input_dim {total} leaves no room for "
            f"a text beside {count} sizes of {width} numbers"
        )
    return sizes(draw, count)


def sizes(draw: Draw, count: int) -> Tensor:
    """Sizes in pixels, float [batch, count]: original, crop, target; or a score at the end."""
    height, width = (_PIXELS * side for side in draw.sides())
    row: list[float] = [height, width, 0, 0, height, width]
    row = [height, width, 0, 0, _AESTHETIC_SCORE] if count == 5 else (row * count)[:count]
    return torch.tensor([row], dtype=torch.float32).repeat(draw.batch, 1)


def gated(draw: Draw) -> Named:
    """Boxes and what is in them (GLIGEN, Li et al. 2023)."""
    kind = draw.config["attention_type"]
    if kind == "default":
        return
    if kind not in ("gated", "gated-text-image"):
        raise unknown(draw, "attention_type")
    width = draw.config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]
    corners = torch.rand(draw.batch, _GLIGEN_BOXES, 2, 2, generator=draw.generator)
    boxes = corners.sort(dim=2).values.flatten(2)
    there = torch.zeros(draw.batch, _GLIGEN_BOXES)
    there[:, :2] = 1.0  # pipelines pad to thirty boxes
    texts = ("positive",) if kind == "gated" else ("phrases", "image")
    place = "cross_attention_kwargs.gligen"
    yield f"{place}.boxes", boxes * there[..., None]
    yield f"{place}.masks", there
    for name in texts:
        yield f"{place}.{name}_embeddings", draw.normal(_GLIGEN_BOXES, width) * there[..., None]
        if kind == "gated-text-image":
            yield f"{place}.{name}_masks", there.clone()


def unknown(draw: Draw, name: str) -> ConfigError:
    """The error for a setting whose value is in no rule."""
    return ConfigError(
        f"{draw.class_name}: {name} {str(draw.config[name])[:80]!r} needs inputs that this "
        f"version does not know; use the Python interface: mpqdm_fx.trace(model, example_inputs)"
    )
