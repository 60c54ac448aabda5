"""Diffusion transformers: which inputs their settings give, and the inputs of one call.

The tables are those of `config_fields` and `example_inputs`, for classes that call the noisy sample
`hidden_states`.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mpqdm_fx.sources.input_parts import Draw, Named

__all__ = ["TEXT_LENGTHS", "TRANSFORMER_CONDITIONS", "TRANSFORMER_FIELDS", "TRANSFORMER_RULES"]

_SAMPLE, _TEXT, _GUIDANCE = ("hidden_states",), ("encoder_hidden_states",), ("guidance",)
_POOLED = ("pooled_projections",)
_SIZES = ("added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio")
_TOKENS_A_SIDE = 32  # of a packed picture, where a config does not say: 512 pixels
_GUIDANCE_SCALES = (2.0, 6.0)
_PIXELS = 8.0  # of an image for one of the latents, per side

#: Tokens of a text, as each class's pipeline has them by default.
TEXT_LENGTHS: Mapping[str, int] = {
    "FluxTransformer2DModel": 512,
    "PixArtTransformer2DModel": 300,
    "SD3Transformer2DModel": 333,  # 77 of CLIP and 256 of T5
    "SanaTransformer2DModel": 300,
}


def _inner(names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names.split(), ())


#: Inside all of them.
_BLOCKS = _inner("num_attention_heads attention_head_dim num_layers patch_size out_channels")
#: Inside those with diffusers' basic blocks.
_BASIC = _inner(
    "dropout norm_num_groups attention_bias activation_fn upcast_attention norm_type "
    "norm_elementwise_affine norm_eps"
)
_SANA = (
    "num_cross_attention_heads cross_attention_head_dim cross_attention_dim mlp_ratio dropout "
    "attention_bias norm_elementwise_affine norm_eps interpolation_scale qk_norm"
)
_LATENTS = {"in_channels": _SAMPLE, "sample_size": _SAMPLE}

#: By class: every setting, with the inputs that it gives or shapes.
TRANSFORMER_FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "DiTTransformer2DModel": {
        **_BLOCKS,
        **_BASIC,
        **_LATENTS,
        "num_embeds_ada_norm": ("class_labels",),
    },
    "FluxTransformer2DModel": {
        **_BLOCKS,
        **_inner("num_single_layers"),
        "in_channels": _SAMPLE,
        "axes_dims_rope": ("img_ids", "txt_ids"),
        "joint_attention_dim": _TEXT,
        "pooled_projection_dim": _POOLED,
        "guidance_embeds": _GUIDANCE,
    },
    "PixArtTransformer2DModel": {
        **_BLOCKS,
        **_BASIC,
        **_LATENTS,
        **_inner("num_embeds_ada_norm interpolation_scale attention_type cross_attention_dim"),
        # a class of this size is told the picture's size unless its config says otherwise
        "sample_size": (*_SAMPLE, *_SIZES),
        "use_additional_conditions": _SIZES,
        "caption_channels": (*_TEXT, "encoder_attention_mask"),
    },
    "SD3Transformer2DModel": {
        **_BLOCKS,
        **_inner("caption_projection_dim pos_embed_max_size dual_attention_layers qk_norm"),
        **_LATENTS,
        "joint_attention_dim": _TEXT,
        "pooled_projection_dim": _POOLED,
    },
    "SanaTransformer2DModel": {
        **_BLOCKS,
        **_inner(_SANA),
        **_LATENTS,
        "caption_channels": (*_TEXT, "encoder_attention_mask"),
        "guidance_embeds": _GUIDANCE,
        "guidance_embeds_scale": _GUIDANCE,
        "timestep_scale": ("timestep",),
    },
}


def _mask(draw: Draw) -> Tensor:
    """Which tokens belong to the text, int64 [batch, tokens] as tokenizers give it."""
    length = draw.context_length
    lengths = torch.randint(1, length + 1, (draw.batch, 1), generator=draw.generator)
    return (torch.arange(length) < lengths).long()


def _guidance(draw: Draw) -> Tensor:
    """Weights of distilled guidance, float32 [batch]."""
    low, high = _GUIDANCE_SCALES
    return low + (high - low) * torch.rand(draw.batch, generator=draw.generator)


def _dit(draw: Draw) -> Named:
    yield "class_labels", draw.turns(draw.config["num_embeds_ada_norm"])


def _pixart(draw: Draw) -> Named:
    config = draw.config
    yield "encoder_hidden_states", draw.normal(draw.context_length, config["caption_channels"])
    yield "encoder_attention_mask", _mask(draw)
    told = config["use_additional_conditions"]
    if told is None:
        told = config["sample_size"] == 128  # the class's own rule
    height, width = draw.sides()
    size = torch.tensor([[_PIXELS * height, _PIXELS * width]]).repeat(draw.batch, 1)
    ratio = torch.full((draw.batch, 1), height / width)
    yield "added_cond_kwargs.resolution", size if told else None
    yield "added_cond_kwargs.aspect_ratio", ratio if told else None


def _sd3(draw: Draw) -> Named:
    config = draw.config
    yield "encoder_hidden_states", draw.normal(draw.context_length, config["joint_attention_dim"])
    yield "pooled_projections", draw.normal(config["pooled_projection_dim"])


def _sana(draw: Draw) -> Named:
    config = draw.config
    yield "encoder_hidden_states", draw.normal(draw.context_length, config["caption_channels"])
    yield "encoder_attention_mask", _mask(draw)
    if config["guidance_embeds"]:
        yield "guidance", _guidance(draw) * config["guidance_embeds_scale"]


def _flux(draw: Draw) -> Named:
    config = draw.config
    axes = len(config["axes_dims_rope"])
    yield "encoder_hidden_states", draw.normal(draw.context_length, config["joint_attention_dim"])
    yield "pooled_projections", draw.normal(config["pooled_projection_dim"])
    side = torch.arange(_TOKENS_A_SIDE).float()
    places = torch.cartesian_prod(side, side)
    ids = torch.cat([torch.zeros(len(places), axes - 2), places], dim=1)
    # with the batch in front, as all inputs have it; the model reads the first row's
    yield "img_ids", ids.repeat(draw.batch, 1, 1)
    yield "txt_ids", torch.zeros(draw.batch, draw.context_length, axes)
    if config["guidance_embeds"]:
        yield "guidance", _guidance(draw)


#: By class: all inputs but the noisy sample and the time.
TRANSFORMER_CONDITIONS: Mapping[str, Callable[[Draw], Named]] = {
    "DiTTransformer2DModel": _dit,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
}


def _picture(conditions: Callable[[Draw], Named], time: float) -> Callable[[Draw], Named]:
    def rule(draw: Draw) -> Named:
        yield "hidden_states", draw.normal(draw.config["in_channels"], *draw.sides())
        yield "timestep", torch.full((draw.batch,), time)
        yield from conditions(draw)

    return rule


def _packed(draw: Draw) -> Named:
    yield "hidden_states", draw.normal(_TOKENS_A_SIDE**2, draw.config["in_channels"])
    yield "timestep", torch.full((draw.batch,), 0.5)
    yield from _flux(draw)


#: By class: all inputs of a call. Times have fractions where the usual schedules have them.
TRANSFORMER_RULES: Mapping[str, Callable[[Draw], Named]] = {
    "DiTTransformer2DModel": _picture(_dit, 500),
    "FluxTransformer2DModel": _packed,
    "PixArtTransformer2DModel": _picture(_pixart, 500),
    "SD3Transformer2DModel": _picture(_sd3, 500.0),
    "SanaTransformer2DModel": _picture(_sana, 500.0),
}
