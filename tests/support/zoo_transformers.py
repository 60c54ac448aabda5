"""DiT, PixArt, SD3, Flux, Sana, AuraFlow and ControlNets."""

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    Transformer2DModel,
)
from zoo_base import class_ids
from zoo_transformer_parts import (
    FLUX,
    FLUX_INPUTS,
    HEADS,
    SANA,
    SD3,
    SD3_INPUTS,
    case,
    fraction,
    integers,
    mask,
)

TRANSFORMERS = (
    case(
        DiTTransformer2DModel,
        {"hidden_states": (4, 8, 8), "timestep": integers, "class_labels": class_ids},
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=8,
    ),
    case(
        PixArtTransformer2DModel,
        {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (5, 24),
            "timestep": integers,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": mask(5),
        },
        name="alpha",
        **HEADS,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=24,
    ),
    case(
        PixArtTransformer2DModel,
        {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (5, 24),
            "timestep": integers,
            "added_cond_kwargs": lambda batch: {
                "resolution": torch.full((batch, 2), 64.0),
                "aspect_ratio": torch.full((batch, 1), 1.0),
            },
        },
        name="conditions",
        num_attention_heads=2,
        attention_head_dim=24,  # three conditions share the width
        num_layers=1,
        cross_attention_dim=48,
        sample_size=8,
        caption_channels=24,
        use_additional_conditions=True,
    ),
    case(SD3Transformer2DModel, SD3_INPUTS, **SD3),
    case(
        SD3Transformer2DModel,
        SD3_INPUTS,
        name="3.5",
        **SD3,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ),
    case(
        FluxTransformer2DModel,
        FLUX_INPUTS | {"pooled_projections": (20,)},
        name="schnell",
        **FLUX,
        pooled_projection_dim=20,
    ),
    case(
        FluxTransformer2DModel,
        FLUX_INPUTS
        | {"pooled_projections": (20,), "guidance": lambda batch: torch.full((batch,), 3.5)},
        name="dev",
        **FLUX,
        pooled_projection_dim=20,
        guidance_embeds=True,
    ),
    case(
        SanaTransformer2DModel,
        {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (5, 24),
            "timestep": integers,
            "encoder_attention_mask": mask(5),
        },
        **SANA,
        num_layers=2,
    ),
    case(
        Transformer2DModel,
        {
            "hidden_states": (16, 8, 8),
            "encoder_hidden_states": (5, 24),
            "timestep": integers,
        },
        name="continuous",
        **HEADS,
        in_channels=16,
        norm_num_groups=4,
        cross_attention_dim=24,
        num_layers=1,
    ),
    case(
        AuraFlowTransformer2DModel,
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (5, 24), "timestep": fraction},
        **HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    ),
)
