"""Folders of diffusion transformers: loaded, drawn with, calibrated on and quantized."""

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
)
from zoo_transformer_parts import FLUX, HEADS, SANA, SD3

import mpqdm_fx
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.evaluation import Evaluation
from mpqdm_fx.sources.denoisers import draw
from mpqdm_fx.sources.sources import load_source

FLOW = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 2000}
PIXART = {
    **HEADS,
    "num_layers": 1,
    "cross_attention_dim": 32,
    "sample_size": 8,
    "caption_channels": 24,
}
KINDS = {
    "dit": (
        lambda: DiTTransformer2DModel(
            **HEADS, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
            num_embeds_ada_norm=8,
        ),
        DPMSolverMultistepScheduler(),
        (4, 8, 8),
    ),
    "pixart": (
        lambda: PixArtTransformer2DModel(**PIXART),
        DPMSolverMultistepScheduler(),
        (4, 8, 8),
    ),
    "sd3": (
        lambda: SD3Transformer2DModel(**SD3),
        FlowMatchEulerDiscreteScheduler(**FLOW),
        (4, 8, 8),
    ),
    "sana": (
        lambda: SanaTransformer2DModel(**SANA, num_layers=1),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        (4, 8, 8),
    ),
    "sana_sprint": (
        lambda: SanaTransformer2DModel(**SANA, num_layers=1, guidance_embeds=True),
        SCMScheduler(),
        (4, 8, 8),
    ),
    "flux": (
        lambda: FluxTransformer2DModel(**FLUX, pooled_projection_dim=20, guidance_embeds=True),
        FlowMatchEulerDiscreteScheduler(**FLOW),
        (1024, 8),
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    build, scheduler, shape = KINDS[request.param]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "transformer")
    scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = load_source(str(tmp_path), "transformer")
    assert loaded.sample_shape == shape
    return loaded


def test_it_draws_and_is_calibrated_on_its_own_runs(source):
    drawn = draw(source, source.model, num=2, steps=2, seed=0)
    assert drawn.shape == (2, *source.sample_shape)
    assert torch.isfinite(drawn).all()
    calls = list(calibration_of(source, trajectories=2, steps=2, seed=0))
    assert sum(len(call["hidden_states"]) for call in calls) == 4
    names = {*source.example_inputs} - {"return_dict"}
    assert all(set(call) == names for call in calls)


@pytest.mark.matrix
def test_it_is_quantized_saved_and_compared(source, tmp_path):
    calls = calibration_of(source, trajectories=4, steps=2, seed=0)
    config = mpqdm_fx.MPQConfig(weight_bits=8, activation_mode="dynamic", allocation="uniform")
    quantized = mpqdm_fx.quantize(source.model, config, calls)
    evaluation = Evaluation.of(source, num=2, steps=2, seed=1, pictures=False)
    measured = evaluation.measure(quantized)
    assert measured.epsilon_sqnr > 25
    assert measured.x0_sqnr > 25
    mpqdm_fx.save(quantized, tmp_path / "saved")
    again = mpqdm_fx.load(tmp_path / "saved")
    assert torch.equal(evaluation.draw(again), evaluation.draw(quantized))
