"""Pipelines of diffusers around a denoiser alone, and our loop with the same noise."""

import inspect

import torch
from torch import nn

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


def ours(model, scheduler, noise, conditions, *, steps=STEPS, **options):
    return denoise(
        model,
        scheduler,
        noise,
        num_inference_steps=steps,
        seed=SEED,
        conditions=conditions,
        **options,
    )


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def embedded(length=5, width=24, seed=1):
    return normal(2, length, width, seed=seed)
