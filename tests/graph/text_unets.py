"""An SDXL-style UNet for tests: a dictionary of added conditions, summed into the time branch."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from small import condition_calls


def tiny_sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """An SDXL-style UNet: sizes and pooled text are added to the time embedding."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
    ).eval()


def sdxl_calls(calls: int = 2, batch: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Keyword arguments of `tiny_sdxl_unet`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            **call,
            "added_cond_kwargs": {
                "text_embeds": torch.randn(batch, 10, generator=generator),
                "time_ids": torch.randint(64, (batch, 6), generator=generator).float(),
            },
        }
        for call in condition_calls(calls, batch, seed)
    ]
