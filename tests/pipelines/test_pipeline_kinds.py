"""Every kind of pipeline as real programs: quantized, lowered, drawn."""

import pytest
import tiny_pipelines
from pipeline_kinds import KINDS, drawn_twice, options_of, pipeline_of
from test_export_programs import decibels
from test_runner_loop import diffusers_image

from mpqdm_fx import export_pipeline
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.pipelines.runner import PipelineRunner

pytestmark = [pytest.mark.matrix, pytest.mark.xnnpack]


@pytest.mark.parametrize("mode", ["float", "static", "dynamic"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stable_diffusion"])
def test_images_of_every_kind_are_the_pipelines(tmp_path, kind, mode):
    pipeline = pipeline_of(kind, tmp_path)
    config = tiny_pipelines.cheap_settings(activation_mode=mode) if mode != "float" else None
    export_pipeline(
        pipeline, config, tmp_path / "out", steps=3, guidance=3.0, trajectories=4,
        **options_of(kind),
    )  # fmt: skip
    runner = PipelineRunner(tmp_path / "out", verify=True)
    expected, actual = drawn_twice(kind, pipeline, runner)
    if mode != "float":
        assert sqnr_db(expected, actual) > 12
    else:
        assert (actual - expected).abs().max() < 1e-3


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
