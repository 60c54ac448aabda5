"""Our loop beside diffusers' pipelines: the same latents from the same noise and embeddings."""

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
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
from zoo_transformer_parts import HEADS, SANA, SD3

from mpqdm_fx.calibration.sampling import _STEP_STREAM


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        FlowMatchEulerDiscreteScheduler(**DYNAMIC, time_shift_type="linear", shift_terminal=0.02),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
        FlowMatchLCMScheduler(shift=3.0),
        FlowMatchLCMScheduler(**DYNAMIC),
        FlowMatchHeunDiscreteScheduler(shift=3.0),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_stable_diffusion_3(scheduler, guidance):
    model = built(SD3Transformer2DModel, **SD3)
    text, pooled, nothing, plain = (
        embedded(),
        normal(2, 20),
        embedded(seed=3),
        normal(2, 20, seed=4),
    )
    noise = normal(2, 4, SIDE, SIDE, seed=2)
    pipeline = without_parts(StableDiffusion3Pipeline, model, scheduler)
    torch.manual_seed(SEED + _STEP_STREAM)  # this pipeline hands its scheduler no generator
    expected = drawn(
        pipeline,
        noise,
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=nothing,
        negative_pooled_prompt_embeds=plain,
        guidance_scale=guidance or 1.0,
    )
    halves = {
        "guidance_scale": guidance,
        "unconditional": {"encoder_hidden_states": nothing, "pooled_projections": plain},
    }
    found = ours(
        model,
        scheduler,
        noise,
        {"encoder_hidden_states": text, "pooled_projections": pooled},
        **(halves if guidance else {}),
    )
    close(found, expected)
    assert float((found - noise).abs().max()) > 0.05


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])


def masked_pair(pipeline_class, model, scheduler, **inputs):
    """Latents of our loop and of a pipeline whose denoiser is told masks, guided."""
    text, nothing, noise = embedded(), embedded(seed=3), normal(2, 4, SIDE, SIDE, seed=2)
    expected = drawn(
        without_parts(pipeline_class, model, scheduler),
        noise,
        negative_prompt=None,
        prompt_embeds=text,
        prompt_attention_mask=MASK,
        negative_prompt_embeds=nothing,
        negative_prompt_attention_mask=MASK,
        guidance_scale=4.5,
        use_resolution_binning=False,
    )
    rest = {"encoder_attention_mask": MASK, **inputs}
    found = ours(
        model,
        scheduler,
        noise,
        {"encoder_hidden_states": text, **rest},
        guidance_scale=4.5,
        unconditional={"encoder_hidden_states": nothing, **rest},
    )
    return found, expected


@pytest.mark.parametrize("out_channels", [4, 8])
def test_pixart_sigma(out_channels):
    model = built(
        PixArtTransformer2DModel,
        **HEADS,
        num_layers=2,
        in_channels=4,
        out_channels=out_channels,
        cross_attention_dim=32,
        sample_size=SIDE,
        caption_channels=24,
        use_additional_conditions=False,
    )
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    close(*masked_pair(PixArtSigmaPipeline, model, DPMSolverMultistepScheduler(), **sizes))


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_sana(timestep_scale):
    model = built(SanaTransformer2DModel, **SANA, num_layers=2, timestep_scale=timestep_scale)
    close(*masked_pair(SanaPipeline, model, FlowMatchEulerDiscreteScheduler(shift=3.0)))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sana_sprint(steps):
    model = built(
        SanaTransformer2DModel, **SANA, num_layers=2, guidance_embeds=True, timestep_scale=1000.0
    )
    scheduler = SCMScheduler()
    text, noise = embedded(), normal(2, 4, SIDE, SIDE, seed=2)
    expected = drawn(
        without_parts(SanaSprintPipeline, model, scheduler),
        noise,
        prompt_embeds=text,
        prompt_attention_mask=MASK,
        guidance_scale=4.5,
        use_resolution_binning=False,
        num_inference_steps=steps,
        **({} if steps == 2 else {"intermediate_timesteps": None}),
    )
    found = ours(
        model,
        scheduler,
        noise,
        {
            "encoder_hidden_states": text,
            "encoder_attention_mask": MASK,
            "guidance": torch.full((2,), 4.5 * model.config.guidance_embeds_scale),
        },
        steps=steps,
    )
    close(found, expected)


def test_aura_flow():
    model = built(
        AuraFlowTransformer2DModel,
        **HEADS,
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=24,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    text, nothing, noise = embedded(), embedded(seed=3), normal(2, 4, SIDE, SIDE, seed=2)
    mask = torch.ones(2, 5, dtype=torch.int64)
    expected = drawn(
        without_parts(AuraFlowPipeline, model, scheduler),
        noise,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=nothing,
        negative_prompt_attention_mask=mask,
        guidance_scale=3.5,
    )
    found = ours(
        model,
        scheduler,
        noise,
        {"encoder_hidden_states": text},
        guidance_scale=3.5,
        unconditional={"encoder_hidden_states": nothing},
    )
    close(found, expected)
