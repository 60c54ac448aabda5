"""Steps of a run: how often they are drawn, what their errors are worth, and how that is found."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.importance import Effects, importance, measure_effects
from mpqdm_fx.distill.runs import Recorder, Start

CONFIG = DistillConfig(updates=1)


def effects_of(seed, calls):
    generator = torch.Generator().manual_seed(seed)
    error, moved = torch.rand(2, calls, generator=generator, dtype=torch.float64)
    return Effects(error=error + 0.01, moved=moved + 1e-6)


@given(
    seed=st.integers(0, 2**20), calls=st.integers(1, 50), share=st.floats(0.0, 0.99),
    a=st.floats(0.5, 4.0), b=st.floats(0.5, 4.0),
)  # fmt: skip
def test_shares_are_probabilities_and_drawing_does_not_change_what_counts(seed, calls, share, a, b):
    config = dataclasses.replace(CONFIG, final_share=share, noise_bias=(a, b))
    sampling = importance(config, calls, effects_of(seed, calls))
    assert float(sampling.draw.sum()) == pytest.approx(1)
    assert float((sampling.draw * sampling.weight).sum()) == pytest.approx(1, rel=1e-5)
    assert bool((sampling.weight > 0).all())
    assert bool((sampling.draw >= 0.1 / calls * (1 - 1e-9)).all())


@given(seed=st.integers(0, 2**20), calls=st.integers(2, 20), share=st.floats(0.0, 0.99))
def test_at_the_start_the_effects_have_their_share_of_the_loss(seed, calls, share):
    effects = effects_of(seed, calls)
    config = dataclasses.replace(CONFIG, final_share=share)
    counted = importance(config, calls, effects)
    worth = counted.draw * counted.weight
    # worth = plain part + effects part; the plain part is alike for all calls
    per_error = effects.moved / effects.error
    design = torch.stack([torch.ones(calls, dtype=torch.float64), per_error], 1)
    by_effect = torch.linalg.lstsq(design, worth[:, None]).solution[1, 0]
    loss = (worth * effects.error).sum()
    assert float(by_effect * effects.moved.sum() / loss) == pytest.approx(share, abs=1e-3)


def test_without_effects_a_bias_draws_the_noisiest_steps_more_and_weighs_all_alike():
    config = dataclasses.replace(CONFIG, noise_bias=(3.0, 1.0))
    sampling = importance(config, 4)
    # Beta(3, 1) has the distribution function z^3
    expected = [1 - 0.75**3, 0.75**3 - 0.5**3, 0.5**3 - 0.25**3, 0.25**3]
    assert sampling.draw.tolist() == pytest.approx(expected, rel=1e-2)
    assert sampling.weight.tolist() == [1.0] * 4
    drawn = sampling.calls(20_000, torch.Generator().manual_seed(0)).bincount(minlength=4) / 20_000
    assert drawn.tolist() == pytest.approx(expected, abs=0.02)


def teacher(sample, timestep):
    return 0.5 * sample


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), EulerAncestralDiscreteScheduler()])
def test_effects_are_those_of_runs_that_err_at_one_step(scheduler):
    recorder = Recorder(
        teacher=teacher, scheduler=scheduler, steps=4, guidance_scale=None, batch_size=8
    )
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    start = Start(noise=noise, conditions={}, unconditional=None, seed=3)

    def student(sample, timestep):
        return teacher(sample, timestep) + 0.1

    effects = measure_effects(student, recorder, start)
    assert effects.error.tolist() == pytest.approx([0.01 * noise.numel()] * 4, rel=1e-4)
    finished = recorder.denoise(teacher, start)
    for place in range(4):
        step = -1

        def erring(sample, timestep, place=place):
            nonlocal step
            step += 1
            return (student if step == place else teacher)(sample, timestep)

        moved = recorder.denoise(erring, start) - finished
        assert float(moved.square().sum()) == pytest.approx(float(effects.moved[place]), rel=1e-4)
    assert effects.moved[0] > effects.moved[-1]


def test_a_student_without_error_leaves_the_plain_importance():
    recorder = Recorder(
        teacher=teacher, scheduler=DDIMScheduler(), steps=3, guidance_scale=None, batch_size=8
    )
    start = Start(noise=torch.randn(1, 1, 2, 2), conditions={}, unconditional=None, seed=0)
    effects = measure_effects(teacher, recorder, start)
    assert effects.moved.tolist() == [0.0] * 3
    assert importance(CONFIG, 3, effects).weight.tolist() == [1.0] * 3


def test_a_learned_variance_is_no_error():
    recorder = Recorder(
        teacher=lambda sample, timestep: torch.cat([sample, 0 * sample], 1),
        scheduler=DDPMScheduler(variance_type="learned_range"),
        steps=3, guidance_scale=None, batch_size=8,
    )  # fmt: skip
    start = Start(noise=torch.randn(2, 1, 4, 4), conditions={}, unconditional=None, seed=0)

    def student(sample, timestep):
        return torch.cat([sample, 0 * sample + 0.5], 1)

    assert measure_effects(student, recorder, start).error.tolist() == [0.0] * 3
