"""Training runs that would go wrong are refused before they begin, or go on."""

import copy
import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from interruption import kill_at
from small import tiny_unet, unet_calls

import mpqdm_fx
from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.errors import ConfigError

CONFIG = DistillConfig(updates=2, trajectories=2, steps=2, batch_size=2, final_share=0.0)


@pytest.fixture(scope="module")
def quantized():
    settings = mpqdm_fx.MPQConfig(allocation="uniform", refinements=0)
    return mpqdm_fx.quantize(tiny_unet(), settings, unet_calls())


def distilled(quantized, config, **options):
    labels = {"class_labels": torch.arange(2)}
    return distill(
        quantized, tiny_unet(), config, scheduler=DDIMScheduler(), conditions=labels, **options
    )


def test_a_run_whose_model_is_told_other_times_is_another_run(quantized, tmp_path, monkeypatch):
    def trained(divisor):
        convention = CallingConvention(time_divisor=divisor, time_scale=2.0)
        return distilled(quantized, CONFIG, directory=tmp_path, convention=convention)

    kill_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        trained(4.0)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"time_divisor was 4\.0, is 8\.0"):
        trained(8.0)
    assert trained(4.0).history.resumed == 1


@pytest.mark.parametrize(
    ("batch", "scale", "remedy"),
    [(3, None, "batch_size=3"), (6, 2.0, "batch_size=3"), (1, 2.0, "train without guidance")],
)
def test_a_fixed_batch_is_refused_before_anything_runs(quantized, batch, scale, remedy):
    fixed = copy.copy(quantized)
    fixed.signature = dataclasses.replace(
        quantized.signature, batch_range=None, batch=batch, note="why"
    )
    config = dataclasses.replace(CONFIG, guidance_scale=scale)
    with pytest.raises(ConfigError, match=rf"for {batch} rows a call alone \(why\).*{remedy}"):
        distilled(fixed, config)
