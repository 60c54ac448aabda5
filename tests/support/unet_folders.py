"""Tiny UNets of every published kind, and folders of them as `save_pretrained` writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from small import plain_unet
from torch import nn

SIDE = 8

_PLAIN: dict[str, Any] = {
    "sample_size": SIDE,
    "block_out_channels": (16, 24),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
_TEXT = _PLAIN | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
}
_SIMPLE = _PLAIN | {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "cross_attention_dim": 12,
    "resnet_time_scale_shift": "scale_shift",
}
_PIXELS = _PLAIN | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

#: By kind: settings beside the usual ones, and whether the scheduler reads a learned variance.
TEXT_KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "latent_consistency": (_TEXT | {"time_cond_proj_dim": 6}, False),
    "inpainting": (_TEXT | {"in_channels": 9}, False),
    "editing": (_TEXT | {"in_channels": 8}, False),
    "upscaling": (_TEXT | {"in_channels": 7, "num_class_embeds": 1000}, False),
    "depth": (_TEXT | {"in_channels": 5}, False),
    "unclip": (
        _SIMPLE | {"in_channels": 3, "out_channels": 6, "class_embed_type": "identity"},
        True,
    ),
    "deepfloyd": (
        _SIMPLE
        | {
            "in_channels": 3,
            "out_channels": 6,
            "encoder_hid_dim": 20,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
        },
        True,
    ),
    "deepfloyd_upscaling": (
        _SIMPLE
        | {
            "in_channels": 6,
            "out_channels": 6,
            "encoder_hid_dim": 20,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 4,
            "class_embed_type": "timestep",
        },
        True,
    ),
    "kandinsky": (
        _SIMPLE
        | {
            "out_channels": 8,
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": 20,
        },
        True,
    ),
    "kandinsky_inpainting": (
        _SIMPLE
        | {
            "in_channels": 9,
            "out_channels": 8,
            "addition_embed_type": "image",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": 20,
        },
        True,
    ),
    "refiner": (
        _TEXT
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 5 * 8 + 10,
        },
        False,
    ),
}

PIXEL_KINDS: dict[str, dict[str, Any]] = {
    "super_resolution": _PIXELS | {"in_channels": 6, "out_channels": 3},
    "class_timestep": _PIXELS | {"class_embed_type": "timestep"},
}

KINDS = (*TEXT_KINDS, *PIXEL_KINDS)


def unet_of(kind: str) -> nn.Module:
    """A tiny random UNet of a kind."""
    torch.manual_seed(0)
    if kind in PIXEL_KINDS:
        return UNet2DModel(**PIXEL_KINDS[kind]).eval()
    return UNet2DConditionModel(**TEXT_KINDS[kind][0]).eval()


def folder_of(kind: str, root: Path, **options: Any) -> Path:
    """A pipeline folder with a UNet of a kind and its scheduler; options of `save_pretrained`."""
    unet_of(kind).save_pretrained(root / "unet", **options)
    learned = kind in TEXT_KINDS and TEXT_KINDS[kind][1]
    scheduler = DDPMScheduler(variance_type="learned_range") if learned else DDIMScheduler()
    scheduler.save_pretrained(root / "scheduler")
    index = {"_class_name": "DDIMPipeline"}
    if kind == "refiner":
        index["requires_aesthetics_score"] = True
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def edit(path: Path, **changes: Any) -> Path:
    """Change entries of a JSON object."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def saved_unet(root: Path, seed: int = 0) -> Path:
    """A model folder of the fewest nodes, with its scheduler."""
    plain_unet(seed).save_pretrained(root)
    DDIMScheduler().save_pretrained(root / "scheduler")
    return root
