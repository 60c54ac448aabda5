"""What schedulers are told, and the noise that they add: as diffusers' pipelines have both."""

import diffusers
import pytest
import tiny_pipelines
import tiny_transformers
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
)

from mpqdm_fx.pipelines.layout import layout_of
from mpqdm_fx.pipelines.loops.loop import Request
from mpqdm_fx.pipelines.program_files import RunnerError
from mpqdm_fx.pipelines.recorded import ModuleParts, float_loop

SANA = {"use_resolution_binning": False, "clean_caption": False}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 40}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipelines by the name of their builder, made once each."""
    pipelines = {}

    def make(name):
        if name not in pipelines:
            where = tiny_transformers if hasattr(tiny_transformers, name) else tiny_pipelines
            pipelines[name] = getattr(where, name)(tmp_path_factory.mktemp(name))
            pipelines[name].set_progress_bar_config(disable=True)
        return pipelines[name]

    return make


def drawn(pipeline, scheduler, *, size=(32, 32), steps=3, guidance=1.0, draws=True):
    """Latents of our loop over the pipeline's own parts; or the scheduler before it draws."""
    layout = layout_of(pipeline)
    loop = float_loop(layout, ModuleParts(layout))
    prompt = "a cat" if "prompt" in layout.loop.needs else None
    request = Request(size=size, steps=steps, guidance=guidance, seed=3, prompt=prompt)
    scheduler = type(scheduler).from_config(scheduler.config)
    return loop.draw(request, scheduler) if draws else loop.schedule(request, scheduler).scheduler


def expected(pipeline, scheduler, *, size=(32, 32), steps=3, guidance=1.0, **options):
    """The pipeline's latents, and the scheduler that it drew with."""
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    sized = {} if size is None else {"height": size[0], "width": size[1]}
    guided = {} if guidance is None else {"guidance_scale": guidance}
    prompt = {"prompt": "a cat"} if hasattr(pipeline, "tokenizer") else {}
    options = {"generator": torch.Generator().manual_seed(3), **options}
    found = pipeline(
        **prompt, **sized, **guided, num_inference_steps=steps, output_type="latent",
        return_dict=False, **options,
    )[0]  # fmt: skip
    return found, pipeline.scheduler


SHIFTED = FlowMatchEulerDiscreteScheduler(**DYNAMIC)
STRETCHED = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.02)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("stable_diffusion_3", SHIFTED),
        ("flux", SHIFTED),
        ("flux", DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True)),
        ("z_image", SHIFTED),
        ("flux_2_klein", SHIFTED),
        ("sana", STRETCHED),
        ("sana", DPMSolverMultistepScheduler(**FLOW, use_dynamic_shifting=True)),
        ("pixart_sigma", DPMSolverMultistepScheduler(use_dynamic_shifting=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize(("steps", "size"), [(2, (32, 32)), (5, (32, 64))])
def test_schedules_are_set_as_the_pipelines_set_them(made, name, scheduler, steps, size):
    pipeline = made(name)
    if name == "stable_diffusion_3":  # whose table of places is small
        size = (32, min(size[1], 48))
    options = SANA if name in ("sana", "pixart_sigma") else {}
    _, theirs = expected(pipeline, scheduler, size=size, steps=steps, **options)
    ours = drawn(pipeline, scheduler, size=size, steps=steps, draws=False)
    for table in ("timesteps", "sigmas"):
        found, wanted = getattr(ours, table), getattr(theirs, table)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    plain = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=False)
    unshifted = drawn(pipeline, plain, size=size, steps=steps, draws=False)
    # the shift is there where the pipeline tells it
    assert torch.equal(unshifted.sigmas, ours.sigmas) == (name in ("sana", "pixart_sigma"))


def test_a_shift_that_the_pipeline_does_not_tell_is_refused_with_the_remedy(made):
    pipeline = made("sana")
    with pytest.raises(ValueError, match="`mu` must be passed"):
        expected(pipeline, SHIFTED, **SANA)
    with pytest.raises(RunnerError, match=r"of this model do not tell a FlowMatchEuler"):
        drawn(pipeline, SHIFTED)


@pytest.mark.parametrize("name", ["flux", "sana"])
def test_a_stretched_schedule_of_one_step_is_refused_by_name(made, name):
    message = r"schedule of 1 steps: timesteps .*\(NaN\): shift_terminal=0.02 .* give 2 steps"
    with pytest.raises(RunnerError, match=message):
        drawn(made(name), STRETCHED, steps=1)


@pytest.mark.parametrize("name", ["flux", "sana", "stable_diffusion_3"])
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchLCMScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_noise_of_the_steps_follows_that_of_the_start(made, name, scheduler):
    pipeline = made(name)
    # Sana's pipeline hands its generator on; the others' steps draw from torch's own
    options = SANA if name == "sana" else {"generator": None}
    torch.manual_seed(3)
    wanted, _ = expected(pipeline, scheduler, **options)
    found = drawn(pipeline, scheduler)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * float(wanted.abs().max()))
    torch.manual_seed(4)  # which a request does not depend on
    assert torch.equal(drawn(pipeline, scheduler), found)


def test_latents_that_change_their_size_are_refused(made):
    scheduler = FlowMatchLCMScheduler(scale_factors=[0.5, 1.0], upscale_mode="nearest")
    with pytest.raises(RunnerError, match=r"latents of another size \(scale_factors\)"):
        drawn(made("stable_diffusion_3"), scheduler)


@pytest.mark.parametrize(
    ("name", "eta", "kind"),
    [
        ("ddpm", None, "TCDScheduler"),
        ("ddpm", None, "DDIMScheduler"),
        ("ddim", 0.0, "DDIMScheduler"),
        ("latent_diffusion", 0.0, "TCDScheduler"),
    ],
)
def test_eta_is_the_schedulers_own_where_the_pipeline_says_none(made, name, eta, kind):
    pipeline = made(name)
    layout = layout_of(pipeline)
    assert layout.convention.eta == eta
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    loop = float_loop(layout, ModuleParts(layout))
    request = Request(size=layout.default_size, steps=3, guidance=1.0, seed=3)
    picture = loop.decode(loop.draw(request, scheduler), request)
    torch.manual_seed(3)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    wanted = torch.from_numpy(pipeline(num_inference_steps=3, output_type="np").images)
    found = (picture / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found, wanted.movedim(-1, 1), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["latent_consistency", "sana_sprint"])
def test_models_with_guidance_inside_take_no_negative_prompt(made, name, tmp_path):
    pipeline = (
        tiny_transformers.sana(tmp_path, sprint=True) if name == "sana_sprint" else made(name)
    )
    layout = layout_of(pipeline)
    assert layout.loop.negatives
    assert not layout.loop.takes_negative(layout.settings)
