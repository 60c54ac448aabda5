"""What each setting of each known model of diffusers does: which inputs it gives or shapes.

A model loaded from a folder is called with inputs made from its config. A setting that nobody knew
would lose a branch of the model without a word (a UNet of latent consistency models without
`timestep_cond` still runs), so a config with a setting that is not in this table is refused.
"""

from collections.abc import Mapping
from typing import Any

from mpqdm_fx.errors import ConfigError
from mpqdm_fx.sources.transformer_inputs import TRANSFORMER_FIELDS

__all__ = ["CLASSES", "FIELDS", "INNER", "check_fields", "inputs_of_field"]

_CONTEXT = "encoder_hidden_states"
_LABELS = "class_labels"
_TEXT, _TIMES = "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"
_IMAGE, _HINT = "added_cond_kwargs.image_embeds", "added_cond_kwargs.hint"
_GUIDANCE = "timestep_cond"
_GATED = "cross_attention_kwargs.gligen"


def _inner(names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(names.split(), ())


#: By name of the setting: the inputs that it gives or shapes, dotted names of forward's arguments.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "sample_size": ("sample",),
    "in_channels": ("sample",),
    "out_channels": ("sample",),  # how many of its channels are noise
    "num_frames": ("sample",),
    "num_class_embeds": (_LABELS,),
    "class_embed_type": (_LABELS,),
    "projection_class_embeddings_input_dim": (_LABELS, _TEXT, _TIMES),
    # where class labels are the embedding itself, they are as wide as the embedded timestep
    "block_out_channels": (_LABELS,),
    "time_embedding_dim": (_LABELS,),
    "time_embedding_type": (_LABELS,),
    # without cross-attention there is nothing that reads a text
    "down_block_types": (_CONTEXT,),
    "mid_block_type": (_CONTEXT,),
    "up_block_types": (_CONTEXT,),
    "cross_attention_dim": (_CONTEXT, _TEXT, _IMAGE, _GATED),
    "encoder_hid_dim": (_CONTEXT, _IMAGE),
    "encoder_hid_dim_type": (_CONTEXT, _IMAGE),
    "addition_embed_type": (_TEXT, _TIMES, _IMAGE, _HINT),
    "addition_time_embed_dim": (_TEXT, _TIMES),
    "time_cond_proj_dim": (_GUIDANCE,),
    "attention_type": (_GATED,),
}

#: Settings that change what is inside a model, and no input.
INNER = frozenset(
    _inner(
        """
    act_fn add_attention addition_embed_type_num_heads attention_head_dim attn_norm_num_groups
    center_input_sample class_embeddings_concat conv_in_kernel conv_out_kernel cross_attention_norm
    downsample_each_block downsample_padding downsample_type dropout dual_cross_attention
    extra_in_channels ff_mult flip_sin_to_cos freq_shift groups layers_per_block
    mid_block_layers mid_block_only_cross_attention mid_block_scale_factor motion_max_seq_length
    motion_num_attention_heads norm_eps norm_num_groups num_attention_heads num_kv_heads
    num_mid_layers num_train_timesteps only_cross_attention out_block_type qk_norm
    resnet_out_scale_factor resnet_skip_time_act resnet_time_scale_shift
    reverse_motion_num_attention_heads reverse_temporal_transformer_layers_per_block
    reverse_transformer_layers_per_block sample_rate temporal_transformer_layers_per_block
    temporal_transformer_layers_per_mid_block time_embedding_act_fn timestep_post_act
    transformer_layers_per_block transformer_layers_per_mid_block upcast_attention upsample_type
    use_linear_projection use_motion_mid_block use_sep_conv use_timestep_embedding
        """
    )
)

_CASCADE_INNER = (
    "patch_size num_attention_heads down_num_layers_per_block up_num_layers_per_block "
    "down_blocks_repeat_mappers up_blocks_repeat_mappers block_types_per_layer clip_seq "
    "conditioning_dim timestep_ratio_embedding_dim pixel_mapper_in_channels kernel_size dropout "
    "self_attn timestep_conditioning_type switch_level block_out_channels out_channels"
)
_UVIT_INNER = (
    "hidden_size use_bias hidden_dropout codebook_size in_channels block_out_channels "
    "num_res_blocks downsample upsample block_num_heads num_hidden_layers num_attention_heads "
    "attention_dropout intermediate_size layer_norm_eps ln_elementwise_affine"
)
_XS_INNER = (
    "time_embedding_mix ctrl_conditioning_channel_order ctrl_learn_time_embedding "
    "ctrl_block_out_channels ctrl_num_attention_heads ctrl_max_norm_num_groups "
    "down_block_types up_block_types block_out_channels"
)


#: By class: settings that mean something else there than in `FIELDS` and `INNER`, or are its own.
CLASSES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "UNet1DModel": _inner(
        "out_channels block_out_channels time_embedding_dim time_embedding_type down_block_types "
        "mid_block_type up_block_types"
    ),
    "UNet2DModel": _inner("down_block_types mid_block_type up_block_types"),
    "UNet2DConditionModel": {"sample_size": ("sample", _HINT)},
    "DreamLiteUNetModel": {"sample_size": ("sample", _HINT)},
    "UNet3DConditionModel": _inner(
        "block_out_channels out_channels down_block_types up_block_types"
    )
    | {"cross_attention_dim": (_CONTEXT,)},
    "UNetMotionModel": _inner("block_out_channels out_channels down_block_types up_block_types")
    | {"cross_attention_dim": (_CONTEXT,), "projection_class_embeddings_input_dim": (_TEXT,)},
    "UNetSpatioTemporalConditionModel": _inner(
        "block_out_channels out_channels down_block_types up_block_types"
    )
    | {
        "cross_attention_dim": (_CONTEXT,),
        "addition_time_embed_dim": ("added_time_ids",),
        "projection_class_embeddings_input_dim": ("added_time_ids",),
    },
    "I2VGenXLUNet": _inner("block_out_channels out_channels down_block_types up_block_types")
    | {
        "sample_size": ("sample", "image_latents"),
        "in_channels": ("sample", "image_latents"),
        "cross_attention_dim": (_CONTEXT, "image_embeddings"),
    },
    "Kandinsky3UNet": _inner("block_out_channels time_embedding_dim cross_attention_dim")
    | {"encoder_hid_dim": (_CONTEXT,)},
    "StableCascadeUNet": _inner(_CASCADE_INNER)
    | {
        "clip_text_in_channels": ("clip_text",),
        "clip_text_pooled_in_channels": ("clip_text_pooled",),
        "clip_image_in_channels": ("clip_img",),
        "effnet_in_channels": ("effnet",),
    },
    "UVit2DModel": _inner(_UVIT_INNER)
    | {
        "sample_size": ("input_ids",),
        "vocab_size": ("input_ids",),
        "encoder_hidden_size": (_CONTEXT,),
        "cond_embed_dim": ("pooled_text_emb",),
        "micro_cond_encode_dim": ("micro_conds",),
        "micro_cond_embed_dim": ("micro_conds",),
    },
    "UNetControlNetXSModel": _inner(_XS_INNER)
    | {
        "sample_size": ("sample", "controlnet_cond"),
        "cross_attention_dim": (_CONTEXT,),
        "ctrl_conditioning_channels": ("controlnet_cond",),
        "ctrl_conditioning_embedding_out_channels": ("controlnet_cond",),
        "projection_class_embeddings_input_dim": (_TEXT,),
    },
    **TRANSFORMER_FIELDS,
}


def inputs_of_field(class_name: str, field: str) -> tuple[str, ...] | None:
    """Inputs that a setting gives or shapes; none if it is inside alone, None if it is unknown."""
    fields = CLASSES[class_name]
    if field in fields:
        return fields[field]
    return FIELDS.get(field, () if field in INNER else None)


def check_fields(class_name: str, config: Mapping[str, Any]) -> None:
    """Refuse a class or a setting whose inputs are not known.

    Args:
        class_name: Name of the model's class.
        config: Its configuration; names that begin with an underscore are not read.

    Raises:
        ConfigError: The class has no row in the table, or a setting is in no row; names it.
    """
    if class_name not in CLASSES:
        raise ConfigError(
            f"example inputs for a {class_name} cannot be guessed; use the Python interface: "
            f"mpqdm_fx.trace(model, example_inputs)"
        )
    for field in config:
        if not field.startswith("_") and inputs_of_field(class_name, field) is None:
            raise ConfigError(
                f"{class_name} has a setting {field[:80]!r} of which this version does not know "
                f"whether it needs an input; use the Python interface: "
                f"mpqdm_fx.trace(model, example_inputs)"
            )
