import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from mpqdm_fx.calibration.sampling import denoise, first_tensor, model_timesteps
from mpqdm_fx.errors import CalibrationError

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
]


def noise(count=3, seed=0):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def toy_model(sample, timestep, shift=None):
    """A smooth stand-in for a denoiser that depends on all of its inputs."""
    level = (timestep.float() / 1000).reshape(-1, 1, 1, 1)
    output = torch.tanh(sample) * (0.5 + level)
    return output if shift is None else output + shift.reshape(-1, 1, 1, 1)


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, **inputs):
        self.calls.append(inputs)
        return toy_model(**inputs)


def state_of(scheduler):
    return {
        name: value.tolist() if hasattr(value, "tolist") else repr(value)
        for name, value in vars(scheduler).items()
    }


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_every_scheduler_runs_gives_finite_samples_and_stays_unchanged(scheduler_class):
    scheduler = scheduler_class()
    before = state_of(scheduler)
    model = Recorder()
    samples = denoise(model, scheduler, noise(), num_inference_steps=6, seed=0)
    assert samples.shape == (3, 2, 4, 4)
    assert torch.isfinite(samples).all()
    assert state_of(scheduler) == before
    assert len({call["timestep"].dtype for call in model.calls}) == 1
    assert all(call["timestep"].shape == (3,) for call in model.calls)


@pytest.mark.parametrize(
    "scheduler_class", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]
)
def test_result_equals_a_loop_written_by_hand(scheduler_class):
    expected_scheduler = scheduler_class()
    expected_scheduler.set_timesteps(5)
    sample = noise() * expected_scheduler.init_noise_sigma
    shift = torch.tensor([0.1, 0.2, 0.3])
    for timestep in expected_scheduler.timesteps:
        scaled = expected_scheduler.scale_model_input(sample, timestep)
        output = toy_model(scaled, timestep.repeat(3), shift)
        sample = expected_scheduler.step(output, timestep, sample).prev_sample
    found = denoise(
        toy_model,
        scheduler_class(),
        noise(),
        num_inference_steps=5,
        seed=0,
        conditions={"shift": shift},
    )
    assert torch.equal(found, sample)


def test_guidance_equals_two_calls_combined_by_hand():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    sample = noise()
    conditional, plain = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    for timestep in scheduler.timesteps:
        with_condition = toy_model(sample, timestep.repeat(3), conditional)
        without = toy_model(sample, timestep.repeat(3), plain)
        output = without + 2.5 * (with_condition - without)
        sample = scheduler.step(output, timestep, sample).prev_sample
    model = Recorder()
    found = denoise(
        model,
        DDIMScheduler(),
        noise(),
        num_inference_steps=5,
        seed=0,
        conditions={"shift": conditional},
        guidance_scale=2.5,
        unconditional={"shift": plain},
    )
    torch.testing.assert_close(found, sample)
    assert len(model.calls) == 5
    for call in model.calls:  # the unconditional half comes first
        assert torch.equal(call["shift"], torch.cat([plain, conditional]))
        assert torch.equal(call["sample"][:3], call["sample"][3:])


def test_nested_conditions_are_paired_at_every_leaf():
    seen = []

    def model(sample, timestep, added, flag):
        seen.append((added["a"].shape, added["b"][0].shape, flag))
        return sample

    denoise(
        model,
        DDIMScheduler(),
        noise(),
        num_inference_steps=1,
        seed=0,
        conditions={"added": {"a": torch.zeros(3, 5), "b": (torch.zeros(3),)}, "flag": None},
        guidance_scale=2.0,
        unconditional={"added": {"a": torch.ones(3, 5), "b": (torch.ones(3),)}, "flag": None},
    )
    assert seen == [((6, 5), (6,), None)]


def test_guidance_without_unconditional_conditions_is_refused():
    with pytest.raises(CalibrationError, match="unconditional"):
        denoise(
            toy_model,
            DDIMScheduler(),
            noise(),
            num_inference_steps=2,
            seed=0,
            conditions={"shift": torch.zeros(3)},
            guidance_scale=2.0,
        )


@pytest.mark.parametrize(
    ("scheduler", "dtype"),
    [
        (DDIMScheduler(), torch.int64),
        (EulerDiscreteScheduler(timestep_spacing="leading"), torch.int64),
        (EulerDiscreteScheduler(timestep_spacing="linspace"), torch.float32),
    ],
)
def test_whole_timesteps_are_integers_and_fractions_stay_float32(scheduler, dtype):
    scheduler.set_timesteps(7)
    timesteps = model_timesteps(scheduler)
    assert timesteps.dtype == dtype
    assert torch.equal(timesteps.double(), scheduler.timesteps.double())


def test_ancestral_noise_depends_on_the_seed_alone():
    def run(seed):
        scheduler = EulerAncestralDiscreteScheduler()
        return denoise(toy_model, scheduler, noise(), num_inference_steps=4, seed=seed)

    torch.manual_seed(1)
    one = run(5)
    torch.manual_seed(2)
    assert torch.equal(run(5), one)
    assert not torch.equal(run(6), one)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, None), lambda x: UNet2DOutput(sample=x), lambda x: [x]]
)
def test_tensor_is_found_in_every_kind_of_output(wrap):
    tensor = torch.ones(2)
    assert first_tensor(wrap(tensor)) is tensor


@pytest.mark.parametrize("output", [None, {}, (), ("text",)])
def test_output_without_tensor_is_refused(output):
    with pytest.raises(CalibrationError, match="the model returned"):
        first_tensor(output)


def test_learned_variance_is_dropped_for_schedulers_that_do_not_use_it():
    def model(sample, timestep):
        return torch.cat([toy_model(sample, timestep), torch.full_like(sample, torch.nan)], 1)

    found = denoise(model, DDIMScheduler(), noise(), num_inference_steps=3, seed=0)
    expected = denoise(toy_model, DDIMScheduler(), noise(), num_inference_steps=3, seed=0)
    assert torch.equal(found, expected)


def test_output_of_another_size_is_refused():
    with pytest.raises(CalibrationError, match="does not look like a denoiser"):
        denoise(
            lambda sample, timestep: sample[..., :2],
            DDIMScheduler(),
            noise(),
            num_inference_steps=2,
            seed=0,
        )


def test_zero_steps_are_refused():
    with pytest.raises(CalibrationError, match="at least 1"):
        denoise(toy_model, DDIMScheduler(), noise(), num_inference_steps=0, seed=0)


def test_callback_sees_every_step_and_the_last_sample():
    seen = []
    samples = denoise(
        toy_model,
        DDIMScheduler(),
        noise(),
        num_inference_steps=4,
        seed=0,
        callback=lambda index, timestep, sample: seen.append((index, int(timestep), sample)),
    )
    assert [entry[:2] for entry in seen] == [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert torch.equal(seen[-1][2], samples)
