"""What pictures are drawn from."""

import torch
from diffusers import DDIMScheduler
from small import plain_unet

from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.jobs.pictures import draw_pictures
from mpqdm_fx.sources.sources import load_source


def test_pictures_start_from_no_noise_that_the_model_was_calibrated_on(tmp_path):
    plain_unet().save_pretrained(tmp_path)
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    source = load_source(str(tmp_path))
    calls = list(calibration_of(source, trajectories=8, steps=2, seed=0))
    last = max(float(call["timestep"].max()) for call in calls)
    fitted = [
        row
        for call in calls
        for row, step in zip(
            call["sample"], call["timestep"].expand(len(call["sample"])), strict=True
        )
        if float(step) == last
    ]
    started = []

    def denoiser(sample, timestep, **conditions):
        started.append(sample.clone())
        return (torch.zeros_like(sample),)

    draw_pictures(source, {"spy": denoiser}, num=8, steps=2)
    assert len(fitted) == 8
    assert not any(torch.equal(row, noise) for row in fitted for noise in started[0])
