import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.unets.unet_2d import UNet2DOutput

from mpqdm_fx.calibration.conventions import CallingConvention
from mpqdm_fx.calibration.sampling import denoise, first_tensor
from mpqdm_fx.calibration.schedules import schedule_of
from mpqdm_fx.errors import CalibrationError, ConfigError

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


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(3, 5)},
        {"a": torch.zeros(3, 5), "b": None},
        {"a": torch.zeros(3, 5), "b": (torch.zeros(3), torch.zeros(3))},
        {"a": torch.zeros(3, 4), "b": (torch.zeros(3),)},
        None,
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_halves_of_guidance_with_other_entries_are_refused(other, swapped):
    halves = [{"added": {"a": torch.zeros(3, 5), "b": (torch.zeros(3),)}}, {"added": other}]
    conditions, unconditional = reversed(halves) if swapped else halves
    with pytest.raises(CalibrationError, match=r"belong together differ: .*same entries"):
        denoise(
            lambda sample, timestep, added: sample,
            DDIMScheduler(),
            noise(),
            num_inference_steps=1,
            seed=0,
            conditions=conditions,
            guidance_scale=2.0,
            unconditional=unconditional,
        )


def test_a_model_that_cannot_be_called_is_told_with_shapes_and_not_with_values():
    def model(sample, timestep, added):
        raise ValueError("no such input")

    added = {"text": torch.full((3, 2), 0.625), "list": [torch.zeros(3)], "flag": True}
    with pytest.raises(CalibrationError, match=r"ValueError: no such input; check") as told:
        denoise(
            model,
            DDIMScheduler(),
            noise(),
            num_inference_steps=1,
            seed=0,
            conditions={"added": added},
        )
    assert "'added': {'text': (3, 2), 'list': [(3,)], 'flag': True}" in str(told.value)
    assert "tensor" not in str(told.value)


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
    timesteps = schedule_of(scheduler, CallingConvention()).times
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


@pytest.mark.parametrize(
    "cut", [lambda x: x[..., :2], lambda x: x[:, :1], lambda x: torch.cat([x, x, x], 1)]
)
def test_output_of_another_size_is_refused(cut):
    with pytest.raises(CalibrationError, match="does not look like a denoiser"):
        denoise(
            lambda sample, timestep: cut(sample), DDIMScheduler(), noise(),
            num_inference_steps=2, seed=0,
        )  # fmt: skip


@pytest.mark.parametrize("scheduler_class", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_added_noise_is_independent_of_noise_that_was_drawn_by_the_same_seed(scheduler_class):
    # of data that is all zero the perfect prediction is known: what is left at every step has the
    # scheduler's own deviation, and more if noise is added to itself
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    alphas = scheduler.alphas_cumprod
    sigmas = ((1 - alphas) / alphas).sqrt()
    ancestral = scheduler_class is EulerAncestralDiscreteScheduler

    def perfect(sample, timestep):
        # Euler's models read the sample over sqrt(sigma^2 + 1), which is DDPM's sample
        return sample / (1 - alphas[timestep[0].round().long()]).sqrt()

    seen = []
    denoise(
        perfect, scheduler, torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(5)),
        num_inference_steps=10, seed=5,
        callback=lambda index, timestep, sample: seen.append(float(sample.std())),
    )  # fmt: skip
    following = scheduler.timesteps[1:].long()
    right = sigmas[following] if ancestral else (1 - alphas[following]).sqrt()
    assert torch.allclose(torch.tensor(seen[:-1]), right, rtol=0.03)


def test_guidance_leaves_a_learned_variance_to_the_conditional_half():
    seen = []

    class Watched(DDPMScheduler):
        def step(self, model_output, *args, **options):
            seen.append(model_output)
            return super().step(model_output, *args, **options)

    def model(sample, timestep, shift):
        return torch.cat(
            [toy_model(sample, timestep, shift), shift.reshape(-1, 1, 1, 1) + 0 * sample], 1
        )

    denoise(
        model, Watched(variance_type="learned_range"), noise(), num_inference_steps=2, seed=0,
        conditions={"shift": torch.full((3,), 0.6)}, unconditional={"shift": torch.full((3,), 0.2)},
        guidance_scale=7.0,
    )  # fmt: skip
    assert torch.equal(seen[0][:, 2:], torch.full((3, 2, 4, 4), 0.6))
    plain, conditional = (
        toy_model(noise(), torch.tensor([500]), s * torch.ones(3)) for s in (0.2, 0.6)
    )
    assert torch.allclose(seen[0][:, :2], plain + 7 * (conditional - plain), atol=1e-5)


def test_flow_matching_equals_a_loop_written_by_hand():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(4)
    sample = noise()
    for timestep in scheduler.timesteps:
        output = toy_model(sample, timestep.repeat(3))
        sample = scheduler.step(output, timestep, sample).prev_sample
    found = denoise(
        toy_model,
        FlowMatchEulerDiscreteScheduler(shift=2.0),
        noise(),
        num_inference_steps=4,
        seed=0,
    )
    assert torch.equal(found, sample)


def test_more_steps_than_the_scheduler_has_are_refused_with_its_own_reason():
    with pytest.raises(ConfigError, match=r"DDIMScheduler has no schedule of 1001 steps: .*1000"):
        denoise(toy_model, DDIMScheduler(), noise(), num_inference_steps=1001, seed=0)


def test_zero_steps_are_refused():
    with pytest.raises(ConfigError, match="num_inference_steps=0"):
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
