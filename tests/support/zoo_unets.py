"""UNet1DModel, UNet2DModel, UNet2DConditionModel and DreamLiteUNetModel with all block types."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet1DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel
from torch import nn
from zoo_base import Case, Inputs, class_ids, normal

# -- UNet1DModel ---------------------------------------------------------------------------------


def unet_1d(name: str, **config: Any) -> Case:
    channels = config.pop("inputs", 2)
    length = config.pop("length", 32)
    return Case(
        name=name,
        build=lambda: UNet1DModel(**config),
        inputs=lambda batch, t: {
            "sample": normal(batch, channels, length),
            "timestep": torch.full((batch,), t),
        },
    )


_RL: dict[str, Any] = {
    "in_channels": 6,
    "out_channels": 6,
    "inputs": 6,
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "act_fn": "mish",
    "block_out_channels": (16, 32),
    "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
}

UNETS_1D = (
    unet_1d(
        "UNet1DModel/audio",
        extra_in_channels=64,
        sample_size=32,
        block_out_channels=(32, 32, 32),
    ),
    unet_1d(
        "UNet1DModel/diffuser",
        **_RL,
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
        out_block_type="OutConv1DBlock",
    ),
    unet_1d(
        "UNet1DModel/value",
        **_RL,
        length=16,
        up_block_types=(),
        mid_block_type="ValueFunctionMidBlock1D",
        out_block_type="ValueFunction",
        downsample_each_block=True,
    ),
)

# -- UNet2DModel ---------------------------------------------------------------------------------


def unet_2d(name: str, labels: Any = None, **config: Any) -> Case:
    def inputs(batch: int, t: int) -> Inputs:
        arguments: Inputs = {"sample": normal(batch, 3, 16, 16), "timestep": t}
        if labels is not None:
            arguments["class_labels"] = labels(batch)
        return arguments

    defaults: Inputs = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return Case(name=name, build=lambda: UNet2DModel(**(defaults | config)), inputs=inputs)


UNETS_2D = (
    unet_2d("UNet2DModel"),
    unet_2d("UNet2DModel/classes", labels=class_ids, num_class_embeds=5),
    unet_2d("UNet2DModel/class-timestep", labels=class_ids, class_embed_type="timestep"),
    unet_2d(
        "UNet2DModel/class-identity",
        labels=lambda batch: normal(batch, 64, seed=3),
        class_embed_type="identity",
    ),
    unet_2d(
        "UNet2DModel/resample-resnet",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
    ),
    unet_2d(
        "UNet2DModel/skip",  # upsamples by FIR filters, as NCSN++ does
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
        mid_block_scale_factor=2**0.5,
        norm_num_groups=None,
        block_out_channels=(32, 32),
    ),
    unet_2d(
        "UNet2DModel/variants",
        center_input_sample=True,
        time_embedding_type="learned",
        num_train_timesteps=1000,
        add_attention=False,
        dropout=0.1,
        act_fn="gelu",
        attn_norm_num_groups=8,
        freq_shift=1,
        flip_sin_to_cos=False,
    ),
    unet_2d("UNet2DModel/no-mid", mid_block_type=None),
)

# -- UNet2DConditionModel ------------------------------------------------------------------------


def unet_2d_condition(
    name: str,
    extra: Callable[[int], Inputs] = lambda batch: {},
    context: int = 24,
    model_class: type[nn.Module] = UNet2DConditionModel,
    channels: int = 4,
    **config: Any,
) -> Case:
    def inputs(batch: int, t: int) -> Inputs:
        return {
            "sample": normal(batch, channels, 16, 16),
            "timestep": t,
            "encoder_hidden_states": normal(batch, 5, context, seed=1),
            **extra(batch),
        }

    defaults: Inputs = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return Case(name=name, build=lambda: model_class(**(defaults | config)), inputs=inputs)


def added(**shapes: tuple[int, ...]) -> Callable[[int], Inputs]:
    return lambda batch: {
        "added_cond_kwargs": {
            key: normal(batch, *shape, seed=4 + i) for i, (key, shape) in enumerate(shapes.items())
        }
    }


def residuals(batch: int) -> Inputs:
    shapes = ((16, 16, 16), (16, 16, 16), (16, 8, 8), (32, 8, 8))
    return {
        "down_block_additional_residuals": tuple(
            normal(batch, *shape, seed=i) for i, shape in enumerate(shapes)
        ),
        "mid_block_additional_residual": normal(batch, 32, 8, 8, seed=9),
    }


UNETS_2D_CONDITION = (
    unet_2d_condition("UNet2DConditionModel"),
    unet_2d_condition(
        "UNet2DConditionModel/sdxl",
        extra=added(text_embeds=(16,), time_ids=(6,)),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    unet_2d_condition(
        "UNet2DConditionModel/text", addition_embed_type="text", addition_embed_type_num_heads=4
    ),
    unet_2d_condition(
        "UNet2DConditionModel/text_image",  # Kandinsky 2.1
        extra=added(image_embeds=(20,), text_embeds=(20,)),
        addition_embed_type="text_image",
        encoder_hid_dim_type="text_image_proj",
        encoder_hid_dim=24,
        cross_attention_dim=20,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/image",  # Kandinsky 2.2
        extra=added(image_embeds=(20,)),
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=20,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
        time_embedding_act_fn="silu",
    ),
    unet_2d_condition(
        "UNet2DConditionModel/image_hint",  # Kandinsky 2.2 with a control image
        extra=added(image_embeds=(20,), hint=(3, 128, 128)),
        in_channels=8,
        addition_embed_type="image_hint",
        encoder_hid_dim_type="image_proj",
        encoder_hid_dim=20,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/text_proj", encoder_hid_dim_type="text_proj", encoder_hid_dim=24
    ),
    unet_2d_condition(
        "UNet2DConditionModel/class-timestep",
        extra=lambda batch: {"class_labels": class_ids(batch)},
        class_embed_type="timestep",
    ),
    unet_2d_condition(
        "UNet2DConditionModel/class-projection",
        extra=lambda batch: {"class_labels": normal(batch, 12, seed=7)},
        class_embed_type="projection",
        projection_class_embeddings_input_dim=12,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/class-simple_projection",
        extra=lambda batch: {"class_labels": normal(batch, 12, seed=7)},
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=12,
        class_embeddings_concat=True,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/class-identity",
        extra=lambda batch: {"class_labels": normal(batch, 64, seed=7)},
        class_embed_type="identity",
    ),
    unet_2d_condition(
        "UNet2DConditionModel/num_class_embeds",
        extra=lambda batch: {"class_labels": class_ids(batch)},
        num_class_embeds=5,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/K",  # the k-upscaler's blocks
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        act_fn="gelu",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=6,
        extra=lambda batch: {"timestep_cond": normal(batch, 6, seed=8)},
        block_out_channels=(32, 32),
        layers_per_block=2,
        time_embedding_dim=32,
        norm_num_groups=None,
        resnet_time_scale_shift="ada_group",
        cross_attention_norm="layer_norm",
        conv_in_kernel=1,
        conv_out_kernel=1,
        only_cross_attention=(True, False),
    ),
    unet_2d_condition("UNet2DConditionModel/controlled", extra=residuals, center_input_sample=True),
    unet_2d_condition(
        "UNet2DConditionModel/masked",
        extra=lambda batch: {
            "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]).repeat(batch, 1).bool()
        },
        dual_cross_attention=False,
        upcast_attention=True,
        only_cross_attention=True,
        resnet_skip_time_act=True,
        resnet_out_scale_factor=1.4,
    ),
    unet_2d_condition(
        "UNet2DConditionModel/gligen",
        extra=lambda batch: {
            "cross_attention_kwargs": {
                "gligen": {
                    "boxes": normal(batch, 3, 4, seed=5).sigmoid(),
                    "positive_embeddings": normal(batch, 3, 24, seed=6),
                    "masks": torch.ones(batch, 3),
                }
            }
        },
        attention_type="gated",
    ),
    unet_2d_condition(
        "DreamLiteUNetModel",
        extra=added(text_embeds=(16,), time_ids=(6,)),
        model_class=DreamLiteUNetModel,
        down_block_types=(
            "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
            "DreamLiteCrossAttnDownBlock2D",
        ),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        ff_mult=2,
    ),
    unet_2d_condition(
        "DreamLiteUNetModel/time",
        extra=added(time_ids=(6,)),
        model_class=DreamLiteUNetModel,
        down_block_types=("DreamLiteDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnNoSelfAttnUpBlock2D", "DreamLiteUpBlock2D"),
        addition_embed_type="time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=48,
        encoder_hid_dim_type="text_proj_rms",
        encoder_hid_dim=24,
        attention_head_dim=(2, 4),
        use_sep_conv=False,
    ),
)
