"""Latents are decoded as the pipeline's class does it, whatever its VAE's config says beside."""

import diffusers
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from conditioned import PROMPTS

from mpqdm_fx.pipelines.components import in_pipeline
from mpqdm_fx.pipelines.families.registry import _FAMILIES
from mpqdm_fx.pipelines.latent_scaling import LatentScaling, latent_scaling
from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.parts import ImageDecoder, ImageEncoder
from mpqdm_fx.sources.denoisers import draw, pictures
from mpqdm_fx.sources.sources import load_source

STATISTICS = {"latents_mean": [0.5, -0.2, 0.3, 0.0], "latents_std": [0.9, 2.0, 1.0, 1.2]}


def saved(folder, kind):
    where = tiny_transformers if hasattr(tiny_transformers, kind) else tiny_pipelines
    pipeline = getattr(where, kind)(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "p")
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    return pipeline, load_source(str(folder / "p"), part)


def test_a_denoiser_alone_is_shown_with_the_shift_that_its_pipeline_adds(tmp_path):
    pipeline, source = saved(tmp_path, "stable_diffusion_3")
    pipeline.vae.register_to_config(shift_factor=0.7)
    pipeline.vae.save_pretrained(tmp_path / "p" / "vae")
    latents = torch.randn(1, *source.sample_shape, generator=torch.Generator().manual_seed(0))
    found = pictures(latents, in_pipeline(source))
    with torch.no_grad():
        unscaled = latents / pipeline.vae.config.scaling_factor
        shifted, plain = (pipeline.vae.decode(unscaled + shift).sample for shift in (0.7, 0.0))
    torch.testing.assert_close(found, shifted, rtol=0, atol=1e-6)
    assert (found - plain).abs().max() > 1e-3


def test_statistics_of_a_vae_that_the_pipeline_passes_over_change_no_picture(tmp_path):
    pipeline, _ = saved(tmp_path, "stable_diffusion")
    pipeline.register_modules(vae=tiny_pipelines.kl_vae(**STATISTICS).eval())
    pipeline.save_pretrained(tmp_path / "q")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = pipeline(
        list(PROMPTS[:2]), latents=noise, height=16, width=16, num_inference_steps=2,
        guidance_scale=3.0, output_type="pt",
    ).images  # fmt: skip
    source = load_source(str(tmp_path / "q"), "unet")
    source = in_pipeline(source, prompts=PROMPTS[:2], guidance=3.0)
    found = pictures(draw(source, source.model, num=2, steps=2, seed=5), source)
    torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "normalised"),
    [("image_to_image", False), ("image_to_image_xl", True)],
)
def test_programs_use_the_statistics_where_the_class_does(tmp_path, kind, normalised):
    pipeline = getattr(tiny_pipelines, kind)(tmp_path)
    pipeline.register_modules(vae=tiny_pipelines.kl_vae(**STATISTICS))
    parts = layout_of(pipeline).parts
    for name, part_class in {"vae_encoder": ImageEncoder, "vae_decoder": ImageDecoder}.items():
        assert isinstance(parts[name].module, part_class)
        assert (parts[name].module.mean is not None) == normalised


def test_the_class_of_a_family_reads_what_the_familys_decoder_uses(tmp_path):
    kinds = ["stable_diffusion", "stable_diffusion_xl", "image_to_image_xl", "latent_consistency"]
    transformers = ["stable_diffusion_3", "flux", "z_image", "pixart_sigma", "sana"]
    seen = set()
    for kind in (*kinds, *transformers):
        where = tiny_transformers if kind in transformers else tiny_pipelines
        pipeline = getattr(where, kind)(tmp_path)
        changed = {"shift_factor": 0.7} | STATISTICS
        pipeline.vae.register_to_config(**changed)
        decoder = layout_of(pipeline).parts["vae_decoder"].module
        found = LatentScaling(shifted=decoder.shift != 0, normalised=decoder.mean is not None)
        assert found == latent_scaling(type(pipeline)), kind
        seen.add(found)
    assert len(seen) == 3


def test_classes_without_a_family_are_read_too():
    assert "StableDiffusion3Img2ImgPipeline" not in _FAMILIES
    shifted = latent_scaling(diffusers.StableDiffusion3Img2ImgPipeline)
    assert shifted == LatentScaling(shifted=True, normalised=False)
    normalised = latent_scaling(diffusers.StableDiffusionXLInpaintPipeline)
    assert normalised == LatentScaling(shifted=False, normalised=True)
    assert latent_scaling(None) == LatentScaling(shifted=True, normalised=True)


@pytest.mark.parametrize("kind", ["stable_diffusion_3", "pixart_sigma", "sana"])
def test_prompts_that_give_more_than_embeddings_are_left_to_random_numbers(tmp_path, kind):
    pipeline, source = saved(tmp_path, kind)
    (remark,) = in_pipeline(source).remarks
    assert f"a {type(pipeline).__name__} has a way of its own to encode prompts" in remark
