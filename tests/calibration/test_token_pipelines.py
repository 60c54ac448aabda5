"""Our loop beside diffusers' pipelines of packed samples and of lists: the same latents."""

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from flow_pipelines import (
    DYNAMIC,
    SEED,
    SIDE,
    built,
    close,
    drawn,
    embedded,
    normal,
    ours,
    without_parts,
)
from torch import nn
from zoo_transformer_parts import FLUX, HEADS, Z_IMAGE, grid

from mpqdm_fx.calibration.conventions import convention_of
from mpqdm_fx.calibration.sampling import _STEP_STREAM


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        FlowMatchLCMScheduler(**DYNAMIC),
    ],
    ids=["static", "dynamic", "lcm"],
)
def test_flux(scheduler):
    model = built(FluxTransformer2DModel, **FLUX, pooled_projection_dim=20, guidance_embeds=True)
    text, pooled, noise = embedded(), normal(2, 20), normal(2, 16, 8, seed=2)
    torch.manual_seed(SEED + _STEP_STREAM)
    expected = drawn(
        without_parts(FluxPipeline, model, scheduler),
        noise,
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        guidance_scale=3.5,
    )
    found = ours(
        model,
        scheduler,
        noise,
        {
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "guidance": torch.full((2,), 3.5),
            "img_ids": grid(4, 4).expand(2, -1, -1),
            "txt_ids": torch.zeros(2, 5, 3),
        },
    )
    close(found, expected)


def test_chroma():
    model = built(
        ChromaTransformer2DModel,
        **HEADS,
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    text, noise = embedded(), normal(2, 16, 8, seed=2)
    mask = torch.ones(2, 5, dtype=torch.bool)
    expected = drawn(
        without_parts(ChromaPipeline, model, scheduler),
        noise,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        guidance_scale=1.0,
    )
    found = ours(
        model,
        scheduler,
        noise,
        {
            "encoder_hidden_states": text,
            "attention_mask": torch.ones(2, 5 + 16, dtype=torch.bool),
            "img_ids": grid(4, 4).expand(2, -1, -1),
            "txt_ids": torch.zeros(2, 5, 3),
        },
    )
    close(found, expected)


class StackedZImage(nn.Module):
    """Z-Image takes lists of pictures [C, 1, H, W] and of texts; here they are tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, cap_feats):
        pictures = list(x.unsqueeze(2).unbind(0))
        return torch.stack(self.model(pictures, t, list(cap_feats.unbind(0)))[0]).squeeze(2)


def test_z_image():
    model = built(ZImageTransformer2DModel, **Z_IMAGE)
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    text, noise = embedded(), normal(2, 4, SIDE, SIDE, seed=2)
    expected = drawn(
        without_parts(ZImagePipeline, model, scheduler),
        noise,
        prompt_embeds=list(text),
        guidance_scale=0.0,
    )
    found = ours(
        StackedZImage(model),
        scheduler,
        noise,
        {"cap_feats": text},
        convention=convention_of("ZImageTransformer2DModel", model.config),
    )
    close(found, expected)
