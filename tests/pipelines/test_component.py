"""Diffusers' own pipelines draw with a quantized model, save it packed, and load it again."""

import json

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from small import TinyNet, net_calls

import mpqdm_fx
from mpqdm_fx import ArtifactError, ConfigError
from mpqdm_fx.component import QuantizedComponent


def calls(unet, *, added=None):
    generator = torch.Generator().manual_seed(0)
    width, side = unet.config.cross_attention_dim, unet.config.sample_size
    return [
        {
            "sample": torch.randn(2, 4, side, side, generator=generator),
            "timestep": torch.randint(1000, (2,), generator=generator),
            "encoder_hidden_states": torch.randn(2, 12, width, generator=generator),
            **(added or {}),
        }
        for _ in range(3)
    ]


def quantized(unet, **options):
    return mpqdm_fx.quantize(unet, tiny_pipelines.cheap_settings(), calls(unet, **options))


def image(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        height=16,
        width=16,
        output_type="np",
    ).images


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A pipeline, its folder, its quantized UNet, and what the pipeline draws with that."""
    root = tmp_path_factory.mktemp("component")
    pipeline = tiny_pipelines.stable_diffusion(root)
    pipeline.save_pretrained(root / "sd")
    unet = pipeline.unet
    model = quantized(unet)
    plain = image(pipeline)
    pipeline.unet = model
    expected = image(pipeline)
    pipeline.unet = unet
    assert 1e-4 < np.abs(plain - expected).max() < 0.3
    return root, model, expected


def test_a_pipeline_takes_the_model_as_its_unet_and_reads_no_float_weights(case, tmp_path):
    root, model, expected = case
    mpqdm_fx.save(model, tmp_path / "packed")
    loaded = QuantizedComponent(mpqdm_fx.load(tmp_path / "packed"))
    assert not loaded.training
    weights = root / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    aside = weights.rename(weights.with_suffix(".aside"))
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(root / "sd", unet=loaded)
    finally:
        aside.rename(weights)
    assert pipeline.unet is loaded
    assert np.array_equal(image(pipeline), expected)


def test_a_pipeline_saves_packed_weights_and_is_loaded_whole(case, tmp_path):
    root, model, expected = case
    parts = {"unet": QuantizedComponent(model)}
    StableDiffusionPipeline.from_pretrained(root / "sd", **parts).save_pretrained(tmp_path / "low")
    index = json.loads((tmp_path / "low" / "model_index.json").read_text())
    assert index["unet"] == ["mpqdm_fx.component", "QuantizedComponent"]
    names = {path.name for path in (tmp_path / "low" / "unet").iterdir()}
    assert names == {
        "config.json", "graph.json.xz", "model.safetensors", "mpqdm.json", "proof.safetensors",
    }  # fmt: skip
    again = DiffusionPipeline.from_pretrained(tmp_path / "low")
    assert isinstance(again, StableDiffusionPipeline)
    assert again.unet.quantized.plan == model.plan
    assert np.array_equal(image(again), expected)
    folder = tmp_path / "low" / "unet"
    halved = QuantizedComponent.from_pretrained(folder, torch_dtype=torch.float16)
    call = {
        name: value.half() if value.is_floating_point() else value
        for name, value in calls(halved)[0].items()
    }
    assert halved.dtype == halved(**call).sample.dtype == torch.float16
    wide = {**call, "sample": call["sample"].float()}
    wide["encoder_hidden_states"] = wide["encoder_hidden_states"].float()
    assert torch.equal(halved(**call).sample, again.unet(**wide).sample.half())
    with pytest.raises(ConfigError, match="compute in float32"):
        QuantizedComponent.from_pretrained(folder, torch_dtype=torch.float64)


def test_a_pipeline_that_reads_shapes_off_its_unet_draws_too(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion_xl(tmp_path)
    unet = pipeline.unet
    added = {"added_cond_kwargs": {"text_embeds": torch.ones(2, 24), "time_ids": torch.ones(2, 6)}}
    component = QuantizedComponent(quantized(unet, added=added))
    plain = image(pipeline)
    pipeline.unet = component
    assert component.add_embedding.linear_1.in_features == unet.add_embedding.linear_1.in_features
    assert 1e-5 < np.abs(image(pipeline) - plain).max() < 0.3
    with pytest.raises(AttributeError, match="fuse_qkv"):
        component.fuse_qkv_projections()


def test_casts_and_other_homes_are_refused(case, tmp_path):
    component = QuantizedComponent(case[1])
    for cast in (
        component.half,
        lambda: component.to(torch.float16),
        lambda: component.to(dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert component.to("cpu") is component
    assert component.dtype == torch.float32
    mpqdm_fx.save(component.quantized, tmp_path / "parts" / "unet")
    again = QuantizedComponent.from_pretrained(tmp_path / "parts", subfolder="unet")
    assert again.config["cross_attention_dim"] == 16
    with pytest.raises(ConfigError, match=r"pipeline\.to"):
        QuantizedComponent.from_pretrained(tmp_path / "parts" / "unet", device_map="auto")
    with pytest.raises(ArtifactError, match=r"mpqdm\.json"):
        QuantizedComponent.from_pretrained(tmp_path / "parts")


def test_models_that_are_not_diffusers_are_refused():
    config = mpqdm_fx.MPQConfig(weight_bits=8, allocation="uniform", refinements=0)
    with pytest.raises(ConfigError, match="TinyNet has no configuration of diffusers"):
        QuantizedComponent(mpqdm_fx.quantize(TinyNet(), config, net_calls()))
