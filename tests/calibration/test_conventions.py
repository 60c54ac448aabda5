import dataclasses
import json

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import nn
from zoo_transformer_parts import SD3

import mpqdm_fx
from mpqdm_fx.calibration.conventions import (
    CONVENTIONS,
    CallingConvention,
    convention_of,
    resolution_shift,
    token_count,
)
from mpqdm_fx.calibration.samplers import model_convention
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.errors import CalibrationError, ConfigError

DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


class Foreign(nn.Module):
    """A denoiser that diffusers does not know."""

    def forward(self, hidden_states, when):
        return hidden_states * when.reshape(-1, 1, 1, 1)


def run(model, scheduler, **options):
    noise = torch.ones(2, 4, 8, 8)
    return denoise(model, scheduler, noise, num_inference_steps=2, seed=0, **options)


def test_a_convention_survives_json():
    for convention in CONVENTIONS.values():
        stored = json.loads(json.dumps(dataclasses.asdict(convention)))
        assert CallingConvention(**stored) == convention


@pytest.mark.parametrize(
    ("class_name", "config", "expected"),
    [
        ("OwnModel", {"patch_size": None}, CallingConvention()),
        ("UNet2DModel", {"patch_size": None}, CallingConvention(shifted=False)),
        ("SD3Transformer2DModel", {"patch_size": 2}, {"patch": 2, "max_shift": 1.16}),
        ("SanaTransformer2DModel", {"timestep_scale": 0.5}, {"time_scale": 0.5}),
        ("FluxTransformer2DModel", {"patch_size": 1}, {"packed": True, "patch": None}),
    ],
)
def test_the_config_says_what_the_class_does_not(class_name, config, expected):
    found = convention_of(class_name, config)
    if isinstance(expected, CallingConvention):
        assert found == expected
        return
    assert found == dataclasses.replace(CONVENTIONS[class_name], **expected)


@pytest.mark.parametrize(
    ("settings", "time", "told"),
    [
        ({}, torch.tensor([999]), torch.tensor([999])),
        ({"time_divisor": 1000.0}, torch.tensor([999]), torch.tensor([0.999])),
        ({"time_scale": 0.5}, torch.tensor([2.5]), torch.tensor([1.25])),
        ({"time_end": 1000.0, "time_divisor": 1000.0}, torch.tensor([250]), torch.tensor([0.75])),
    ],
)
def test_times_are_told_as_the_convention_has_them(settings, time, told):
    found = CallingConvention(**settings).model_times(time)
    assert found.dtype == told.dtype
    assert torch.equal(found, told)


def test_tokens_are_squares_of_a_picture_or_the_sequence_itself():
    assert token_count(CallingConvention(patch=2), (4, 8, 6)) == 12
    assert token_count(CallingConvention(packed=True), (15, 64)) == 15


def test_the_shift_goes_from_the_base_to_the_largest():
    config = {"base_image_seq_len": 10, "max_image_seq_len": 30, "base_shift": 1, "max_shift": 2}
    shifts = [
        resolution_shift(config, CallingConvention(packed=True), (tokens, 4), 7)
        for tokens in (10, 20, 30)
    ]
    assert shifts == pytest.approx([1.0, 1.5, 2.0])
    with pytest.raises(CalibrationError, match=r"both 10; .* needs two of them"):
        resolution_shift(
            {**config, "max_image_seq_len": 10}, CallingConvention(packed=True), (5, 4), 7
        )


@pytest.mark.parametrize("tokens", [16, 4096, 4300, 4301, 10000])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_shift_of_flux_2_is_that_of_tokens_and_steps(tokens, steps):
    convention = convention_of("Flux2Transformer2DModel", {"patch_size": 1})
    shift = resolution_shift({"base_shift": 7.0}, convention, (tokens, 128), steps)
    assert shift == compute_empirical_mu(tokens, steps)


def test_a_shift_by_tokens_that_are_not_known_is_refused_with_two_ways_out():
    with pytest.raises(CalibrationError, match=r"patch=\.\.\.\), or .* use_dynamic_shifting=False"):
        run(lambda sample, timestep: sample, DYNAMIC)
    run(lambda sample, timestep: sample, DYNAMIC, convention=CallingConvention(patch=2))


def test_pictures_where_a_sequence_is_due_are_refused():
    with pytest.raises(CalibrationError, match=r"\(4, 8, 8\) are no packed .*\[N, tokens, chan"):
        run(
            lambda sample, timestep: sample,
            DYNAMIC,
            convention=CallingConvention(packed=True),
        )


def test_a_foreign_model_says_how_it_is_called():
    with pytest.raises(ConfigError, match=r"takes \(hidden_states, when\).*CallingConvention\("):
        run(Foreign(), DDIMScheduler())
    named = CallingConvention(sample="hidden_states", timestep="when")
    assert torch.isfinite(run(Foreign(), DDIMScheduler(), convention=named)).all()


def test_a_quantized_model_is_called_like_its_float_one():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(**SD3).eval()
    conditions = {
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
    }
    data = mpqdm_fx.Trajectories(
        model,
        DYNAMIC,
        num_trajectories=2,
        num_inference_steps=2,
        batch_size=2,
        seed=0,
        conditions=conditions,
    )
    assert {"hidden_states", "timestep"} <= set(next(iter(data)))
    config = mpqdm_fx.MPQConfig(
        weight_bits=8, allocation="uniform", rounding="nearest", activation_mode="dynamic"
    )
    quantized = mpqdm_fx.quantize(model, config, data)
    assert model_convention(quantized) == model_convention(model)
    noise = torch.randn(2, 4, 8, 8)
    rows = [
        denoise(net, DYNAMIC, noise, num_inference_steps=2, seed=0, conditions=conditions)
        for net in (model, quantized)
    ]
    assert 0 < float((rows[0] - rows[1]).norm() / rows[0].norm()) < 0.05
