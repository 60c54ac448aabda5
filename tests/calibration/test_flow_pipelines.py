"""Our loop beside diffusers' pipelines: the same latents from the same noise and embeddings."""

import inspect

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from zoo_transformer_parts import FLUX, HEADS, SANA, SD3

from mpqdm_fx.calibration.conventions import convention_of
from mpqdm_fx.calibration.sampling import _STEP_STREAM, denoise

SIDE, STEPS, SEED = 8, 3, 5
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 40}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(model_class, **config):
    torch.manual_seed(0)
    model = model_class(**config).eval()
    for parameter in model.parameters():  # what starts at zero would hide a mistake
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    return model


def without_parts(pipeline_class, transformer, scheduler):
    """A pipeline of a denoiser alone: embeddings and noise are given, latents are taken."""
    names = list(inspect.signature(pipeline_class.__init__).parameters)[1:]
    parts = {n: None for n in names if n.startswith(("vae", "text_encoder", "tokenizer"))}
    pipeline = pipeline_class(**parts, transformer=transformer, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, noise, **options):
    """The pipeline's latents; schedulers that add noise get the stream that our loop has."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    return pipeline(
        latents=noise,
        generator=torch.Generator().manual_seed(SEED + _STEP_STREAM),
        output_type="latent",
        return_dict=False,
        **{
            "num_inference_steps": STEPS,
            "height": SIDE * scale,
            "width": SIDE * scale,
            **options,
        },
    )[0]


def ours(model, scheduler, noise, conditions, **options):
    return denoise(
        model,
        scheduler,
        noise,
        num_inference_steps=STEPS,
        seed=SEED,
        conditions=conditions,
        **options,
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def embedded(length=5, width=24, seed=1):
    return normal(2, length, width, seed=seed)


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
    scheduler = DPMSolverMultistepScheduler()
    text, nothing, noise = embedded(), embedded(seed=3), normal(2, 4, SIDE, SIDE, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    expected = drawn(
        without_parts(PixArtSigmaPipeline, model, scheduler),
        noise,
        negative_prompt=None,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=nothing,
        negative_prompt_attention_mask=mask,
        guidance_scale=4.5,
        use_resolution_binning=False,
    )
    sizes = {"resolution": None, "aspect_ratio": None}
    rest = {"encoder_attention_mask": mask, "added_cond_kwargs": sizes}
    found = ours(
        model,
        scheduler,
        noise,
        {"encoder_hidden_states": text, **rest},
        guidance_scale=4.5,
        unconditional={"encoder_hidden_states": nothing, **rest},
    )
    close(found, expected)


@pytest.mark.parametrize("timestep_scale", [1.0, 0.001])
def test_sana(timestep_scale):
    model = built(SanaTransformer2DModel, **SANA, num_layers=2, timestep_scale=timestep_scale)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    text, nothing, noise = embedded(), embedded(seed=3), normal(2, 4, SIDE, SIDE, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    expected = drawn(
        without_parts(SanaPipeline, model, scheduler),
        noise,
        negative_prompt=None,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        negative_prompt_embeds=nothing,
        negative_prompt_attention_mask=mask,
        guidance_scale=4.5,
        use_resolution_binning=False,
    )
    found = ours(
        model,
        scheduler,
        noise,
        {"encoder_hidden_states": text, "encoder_attention_mask": mask},
        guidance_scale=4.5,
        unconditional={"encoder_hidden_states": nothing, "encoder_attention_mask": mask},
    )
    close(found, expected)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sana_sprint(steps):
    model = built(
        SanaTransformer2DModel, **SANA, num_layers=2, guidance_embeds=True, timestep_scale=1000.0
    )
    scheduler = SCMScheduler()
    text, noise = embedded(), normal(2, 4, SIDE, SIDE, seed=2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    expected = drawn(
        without_parts(SanaSprintPipeline, model, scheduler),
        noise,
        prompt_embeds=text,
        prompt_attention_mask=mask,
        guidance_scale=4.5,
        use_resolution_binning=False,
        num_inference_steps=steps,
        **({} if steps == 2 else {"intermediate_timesteps": None}),
    )
    found = denoise(
        model,
        scheduler,
        noise,
        num_inference_steps=steps,
        seed=SEED,
        conditions={
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "guidance": torch.full((2,), 4.5 * model.config.guidance_embeds_scale),
        },
    )
    close(found, expected)


def positions(side):
    """Flux's position ids of a square of tokens, [tokens, 3]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


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
            "img_ids": positions(4).expand(2, -1, -1),
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
            "img_ids": positions(4).expand(2, -1, -1),
            "txt_ids": torch.zeros(2, 5, 3),
        },
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


class StackedZImage(nn.Module):
    """Z-Image takes lists of pictures [C, 1, H, W] and of texts; here they are tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, cap_feats):
        pictures = list(x.unsqueeze(2).unbind(0))
        return torch.stack(self.model(pictures, t, list(cap_feats.unbind(0)))[0]).squeeze(2)


def test_z_image():
    model = built(
        ZImageTransformer2DModel,
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 32, 32],
    )
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
