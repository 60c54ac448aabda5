"""Inputs and settings that the transformers of the zoo share."""

from typing import Any

import torch
from torch import nn
from zoo_base import Case, Inputs, normal


def case(
    model_class: type[nn.Module],
    tensors: dict[str, Any],
    name: str = "",
    timestep: str = "timestep",
    **config: Any,
) -> Case:
    """Make a case; ``tensors`` maps arguments to shapes without the batch, or to functions."""

    def inputs(batch: int, t: int) -> Inputs:
        arguments: Inputs = {}
        for seed, (argument, value) in enumerate(tensors.items()):
            if argument == timestep:
                arguments[argument] = value(batch, t)
            elif callable(value):
                arguments[argument] = value(batch)
            elif isinstance(value, tuple):
                arguments[argument] = normal(batch, *value, seed=seed)
            else:
                arguments[argument] = value
        return arguments

    title = model_class.__name__ + (f"/{name}" if name else "")
    return Case(name=title, build=lambda: model_class(**config), inputs=inputs)


def integer(batch: int, t: int) -> int:
    return t


def integers(batch: int, t: int) -> torch.Tensor:
    return torch.full((batch,), t)


def floats(batch: int, t: int) -> torch.Tensor:
    return torch.full((batch,), float(t))


def fraction(batch: int, t: int) -> torch.Tensor:
    return torch.full((batch,), t / 1000)


def mask(length: int, dtype: torch.dtype = torch.bool) -> Any:
    return lambda batch: (torch.arange(length) < length - 2).to(dtype).repeat(batch, 1)


def grid(*sizes: int, axes: int = 3) -> torch.Tensor:
    """Position ids [tokens, axes] of a grid, without a batch axis."""
    points = torch.cartesian_prod(*(torch.arange(s) for s in sizes)).float().reshape(-1, len(sizes))
    return torch.cat([torch.zeros(len(points), axes - len(sizes)), points], dim=1)


def one_grid(*sizes: int, axes: int = 3) -> Any:
    return lambda batch: grid(*sizes, axes=axes)


HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}

Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 24,
    "axes_dims": [4, 4, 8],
    "axes_lens": [64, 32, 32],
}

FLUX: dict[str, Any] = {
    **HEADS,
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 8),
}

FLUX_INPUTS: dict[str, Any] = {
    "hidden_states": (16, 8),
    "encoder_hidden_states": (5, 24),
    "timestep": fraction,
    "img_ids": one_grid(4, 4),
    "txt_ids": lambda batch: torch.zeros(5, 3),
}

SD3: dict[str, Any] = {
    **HEADS,
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 8,
}

SD3_INPUTS: dict[str, Any] = {
    "hidden_states": (4, 8, 8),
    "encoder_hidden_states": (5, 24),
    "pooled_projections": (20,),
    "timestep": integers,
}

COGVIDEO: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 24,
    "num_layers": 1,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "max_text_seq_length": 8,
}

COGVIDEO_INPUTS: dict[str, Any] = {
    "hidden_states": (2, 4, 8, 8),
    "encoder_hidden_states": (8, 24),
    "timestep": integers,
}

COGVIEW: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "text_embed_dim": 24,
    "time_embed_dim": 8,
    "condition_dim": 4,
}

COGVIEW_INPUTS: dict[str, Any] = {
    "hidden_states": (4, 8, 8),
    "encoder_hidden_states": (5, 24),
    "timestep": integers,
    "original_size": (2,),
    "target_size": (2,),
    "crop_coords": (2,),
}

HUNYUAN_DIT: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "sample_size": 8,
    "hidden_size": 32,
    "cross_attention_dim": 24,
    "cross_attention_dim_t5": 24,
    "pooled_projection_dim": 20,
    "text_len": 5,
    "text_len_t5": 6,
}

OMNIGEN: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_layers": 1,
    "pad_token_id": 0,
    "vocab_size": 40,
    "rope_scaling": {
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + axis / 8 for axis in range(8)],
    },
    "pos_embed_max_size": 8,
    "time_step_dim": 8,
}

#: Six tokens of the prompt, one of the timestep, sixteen of the image.
OMNIGEN_INPUTS: dict[str, Any] = {
    "hidden_states": (4, 8, 8),
    "timestep": floats,
    "input_ids": lambda batch: torch.arange(6 * batch).reshape(batch, 6),
    "input_img_latents": lambda batch: [],
    "input_image_sizes": lambda batch: {},
    "attention_mask": lambda batch: torch.ones(23, 23).tril().repeat(batch, 1, 1),
    "position_ids": lambda batch: torch.arange(23).repeat(batch, 1),
}

SANA: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "sample_size": 8,
}

WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}

CONTROLNET: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "conditioning_embedding_out_channels": (4, 8),
}
