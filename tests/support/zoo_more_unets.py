"""The UNets for video, ControlNet-XS, Kandinsky 3, U-ViT, Stable Cascade and I2VGen-XL."""

from typing import Any

import torch
from diffusers import (
    I2VGenXLUNet,
    Kandinsky3UNet,
    StableCascadeUNet,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
)
from zoo_base import Case, Inputs, normal

_SMALL: Inputs = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}


def _video(batch: int, t: int, texts: int = 1, **extra: Any) -> Inputs:
    return {
        "sample": normal(batch, 4, 3, 8, 8),
        "timestep": t,
        "encoder_hidden_states": normal(batch * texts, 5, 24, seed=1),
        **extra,
    }


OTHER_UNETS = (
    Case(
        name="UNet3DConditionModel",
        build=lambda: UNet3DConditionModel(
            **_SMALL,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        inputs=_video,
    ),
    Case(
        name="UNetMotionModel",
        build=lambda: UNetMotionModel(
            **_SMALL,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        ),
        inputs=lambda batch, t: _video(batch, t, texts=3),  # one prompt per frame
    ),
    Case(
        name="UNetSpatioTemporalConditionModel",
        build=lambda: UNetSpatioTemporalConditionModel(
            in_channels=8,
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(32, 64),
            num_attention_heads=(2, 4),
            cross_attention_dim=24,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=3,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        ),
        inputs=lambda batch, t: {
            "sample": normal(batch, 3, 8, 8, 8),
            "timestep": t,
            "encoder_hidden_states": normal(batch, 1, 24, seed=1),
            "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1),
        },
    ),
    Case(
        name="UNetControlNetXSModel",
        build=lambda: UNetControlNetXSModel(
            sample_size=8,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            cross_attention_dim=24,
            num_attention_heads=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            ctrl_block_out_channels=(4, 8),
            ctrl_num_attention_heads=2,
            ctrl_max_norm_num_groups=4,
            ctrl_conditioning_embedding_out_channels=(4, 8),
            time_embedding_mix=0.5,
            ctrl_learn_time_embedding=True,
        ),
        inputs=lambda batch, t: {
            "sample": normal(batch, 4, 8, 8),
            "timestep": t,
            "encoder_hidden_states": normal(batch, 5, 24, seed=1),
            "controlnet_cond": normal(batch, 3, 16, 16, seed=2),
            "conditioning_scale": 0.8,
        },
    ),
    Case(
        name="Kandinsky3UNet",
        build=lambda: Kandinsky3UNet(
            time_embedding_dim=32,
            groups=4,
            attention_head_dim=8,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=24,
            encoder_hid_dim=20,
        ),
        inputs=lambda batch, t: {
            "sample": normal(batch, 4, 16, 16),
            "timestep": t,
            "encoder_hidden_states": normal(batch, 5, 20, seed=1),
            "encoder_attention_mask": torch.tensor([[1.0, 1, 1, 1, 0]]).repeat(batch, 1),
        },
    ),
    Case(
        name="UVit2DModel",
        build=lambda: UVit2DModel(
            hidden_size=32,
            cond_embed_dim=16,
            micro_cond_encode_dim=8,
            micro_cond_embed_dim=40,
            encoder_hidden_size=24,
            vocab_size=33,
            codebook_size=32,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=2,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            sample_size=8,
        ),
        inputs=lambda batch, t: {  # tokens take the place of timesteps
            "input_ids": (torch.arange(batch * 64).reshape(batch, 8, 8) + t) % 33,
            "encoder_hidden_states": normal(batch, 5, 24, seed=1),
            "pooled_text_emb": normal(batch, 16, seed=2),
            "micro_conds": normal(batch, 5, seed=3),
        },
    ),
    Case(
        name="StableCascadeUNet/prior",
        build=lambda: StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=20,
            clip_text_pooled_in_channels=20,
            clip_image_in_channels=12,
            switch_level=(False,),
        ),
        inputs=lambda batch, t: {
            "sample": normal(batch, 4, 8, 8),
            "timestep_ratio": torch.full((batch,), t / 1000),
            "clip_text_pooled": normal(batch, 1, 20, seed=1),
            "clip_text": normal(batch, 5, 20, seed=2),
            "clip_img": normal(batch, 1, 12, seed=3),
        },
    ),
    Case(
        name="StableCascadeUNet/decoder",
        build=lambda: StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=16,
            patch_size=2,
            conditioning_dim=32,
            block_out_channels=(16, 32),
            num_attention_heads=(0, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(2, 2),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            clip_text_pooled_in_channels=20,
            effnet_in_channels=6,
            pixel_mapper_in_channels=3,
            timestep_conditioning_type=("sca",),
        ),
        inputs=lambda batch, t: {
            "sample": normal(batch, 4, 16, 16),
            "timestep_ratio": torch.full((batch,), t / 1000),
            "clip_text_pooled": normal(batch, 1, 20, seed=1),
            "effnet": normal(batch, 6, 4, 4, seed=2),
        },
    ),
    Case(
        name="I2VGenXLUNet",
        build=lambda: I2VGenXLUNet(
            **_SMALL,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        inputs=lambda batch, t: _video(
            batch,
            t,
            fps=torch.full((batch,), 8),
            image_latents=normal(batch, 4, 3, 8, 8, seed=2),
            image_embeddings=normal(batch, 24, seed=3),
        ),
    ),
)
