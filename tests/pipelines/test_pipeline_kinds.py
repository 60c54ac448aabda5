"""Every kind of pipeline as real programs: quantized, lowered, drawn."""

import numpy as np
import pytest
import tiny_pipelines
import tiny_transformers
from test_export_programs import decibels
from test_runner_loop import diffusers_image

from mpqdm_fx import export_pipeline
from mpqdm_fx.pipelines.runner import PipelineRunner

pytestmark = [pytest.mark.matrix, pytest.mark.xnnpack]


def pixels(runner):
    """Inputs of the runner and of the pipeline that are neither prompt nor numbers."""
    needs = runner.loop.needs
    if "image" not in needs:
        return {}, {}
    from PIL import Image

    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    if "mask" not in needs:
        return {"image": image}, {"image": Image.fromarray(image)}
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 5:14] = 255
    pictures = {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask)}
    return {"image": image, "mask": mask}, {**pictures, "height": 16, "width": 16}


@pytest.mark.parametrize("mode", ["float", "static", "dynamic"])
@pytest.mark.parametrize(
    "kind",
    [
        "stable_diffusion_xl",
        "inpainting",
        "ddpm",
        "ddim",
        "latent_diffusion",
        "latent_consistency",
        "image_to_image",
        "image_to_image_xl",
        "instruct_pix2pix",
        "controlnet",
        "pixart_sigma",
        "stable_diffusion_3",
        "sana",
        "flux",
        "z_image",
        "shallow_flux_2_klein",
    ],
)
def test_images_of_every_kind_are_the_pipelines(tmp_path, kind, mode):
    module = tiny_pipelines if hasattr(tiny_pipelines, kind) else tiny_transformers
    pipeline = getattr(module, kind)(tmp_path)
    config = tiny_pipelines.cheap_settings(activation_mode=mode) if mode != "float" else None
    side = 32 if kind == "sana" else 16
    told = ("sana", "flux", "z_image", "shallow_flux_2_klein")
    sizes = [(side, side)] if kind in told else None  # else what the pipeline draws
    export_pipeline(
        pipeline, config, tmp_path / "out", sizes=sizes, steps=3, guidance=3.0, trajectories=4
    )
    runner = PipelineRunner(tmp_path / "out", verify=True)
    prompt = [] if runner.manifest["kind"] == "unconditional" else ["a cat"]
    guided = {"guidance_scale": 3.0} if prompt else {}
    runner_call, pipeline_call = pixels(runner)
    if kind in ("pixart_sigma", "sana"):
        pipeline_call = {"use_resolution_binning": False, "clean_caption": False}
    if kind in ("pixart_sigma", *told):
        pipeline_call |= {"height": side, "width": side}
    expected = diffusers_image(pipeline, *prompt, num_inference_steps=3, **guided, **pipeline_call)
    actual = runner.sample(*prompt, **runner_call)
    if mode != "float":
        assert decibels(expected, actual) > 12
    else:
        assert np.abs(actual - expected).max() < 1e-3


def test_two_sizes_share_the_integers_and_draw_at_both(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path, time_cond_proj_dim=32)
    result = export_pipeline(
        pipeline, tiny_pipelines.cheap_settings(), tmp_path / "out",
        sizes=[(16, 16), (24, 16)], steps=2, guidance=3.0, trajectories=4,
    )  # fmt: skip
    runner = PipelineRunner(tmp_path / "out")
    for height, width in runner.sizes:
        expected = diffusers_image(
            pipeline, "a cat", num_inference_steps=2, guidance_scale=3.0, height=height, width=width
        )
        actual = runner.sample("a cat", height=height, width=width)
        assert decibels(expected, actual) > 12
    assert set(result.manifest["parts"]) == {"text_encoder", "denoiser", "vae_decoder"}


def test_sizes_add_methods_and_not_weights_with_dynamic_activations_and_tables(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion(tmp_path, block_out_channels=(96,))
    result = export_pipeline(
        pipeline, tiny_pipelines.cheap_settings(activation_mode="dynamic"), tmp_path / "out",
        sizes=[(16, 16), (24, 16)], steps=2, guidance=3.0, trajectories=4, tabulate=True,
    )  # fmt: skip
    entries = [e for e in result.manifest["methods"] if e["part"] == "denoiser"]
    assert [e["method"] for e in entries] == ["encode_prompt", "denoise", "denoise_24x16"]
    weights = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    assert result.manifest["files"]["denoiser.pte"]["bytes"] < 1.2 * weights
    runner = PipelineRunner(tmp_path / "out", verify=True)
    for height, width in runner.sizes:
        expected = diffusers_image(
            pipeline, "a cat", num_inference_steps=2, guidance_scale=3.0, height=height, width=width
        )
        assert decibels(expected, runner.sample("a cat", height=height, width=width)) > 15
