"""Sampling loops of one's own in the place of a scheduler: what is recorded, drawn and refused."""

import pytest
import torch
from diffusers import DDIMScheduler
from samplers import Consistency, Guided, Heun, InPlace
from small import SIGMAS, TinyEDM

import mpqdm_fx
from mpqdm_fx.calibration.samplers import is_sampler
from mpqdm_fx.calibration.sampling import denoise, denoise_in_batches
from mpqdm_fx.calibration.trajectories import Trajectories
from mpqdm_fx.errors import CalibrationError, ConfigError
from mpqdm_fx.graph.nested import concatenate
from mpqdm_fx.report.metrics import epsilon_sqnr
from mpqdm_fx.report.reference_run import run_reference
from mpqdm_fx.report.sample_metrics import x0_sqnr

SHAPE = (2, 6, 10)
DIFFICULTY = {"difficulty": torch.linspace(0, 1, 6)}
CALLS = [(Heun(), 9), (InPlace(), 5), (Guided(), 18), (Consistency(), 1), (Consistency(SIGMAS), 5)]


def trajectories(sampler, model=None, **changes):
    settings = {
        "num_trajectories": 6,
        "batch_size": 4,
        "seed": 0,
        "sample_shape": SHAPE,
        "conditions": DIFFICULTY,
    }
    return Trajectories(model or TinyEDM(), sampler, **(settings | changes))


@pytest.mark.parametrize(("sampler", "calls"), CALLS)
@pytest.mark.parametrize("held_out", [0, 2])
def test_every_call_of_every_run_is_recorded_as_it_was_made(sampler, calls, held_out):
    seen = []

    class Watched(TinyEDM):
        def forward(self, noisy, sigma, difficulty):
            seen.append({"noisy": noisy, "sigma": sigma, "difficulty": difficulty})
            seen[-1] = {name: value.clone() for name, value in seen[-1].items()}
            return super().forward(noisy, sigma, difficulty)

    def rows(batches):
        whole = concatenate(batches)
        return {
            (*noisy.flatten().tolist(), float(sigma), float(difficulty))
            for noisy, sigma, difficulty in zip(
                whole["noisy"], whole["sigma"], whole["difficulty"], strict=True
            )
        }

    data = trajectories(sampler, Watched(), held_out=held_out)
    batches = list(data)
    assert len(concatenate(batches)["noisy"]) == 6 * calls
    assert rows(batches) == rows(seen)
    with torch.no_grad():
        model = TinyEDM()
        apart = [batches[index] for index in data.held_out_calls]
        if held_out:
            difficulties = concatenate(apart)["difficulty"].unique().tolist()
            assert set(difficulties) - {0.0} == set(DIFFICULTY["difficulty"][4:].tolist())
        assert all(bool(model(**batch).isfinite().all()) for batch in batches)


def test_the_samples_are_what_the_loop_makes_of_the_noise():
    sampler, noise = Consistency(SIGMAS), torch.randn(3, *SHAPE)
    options = {"seed": 5, "conditions": {"difficulty": torch.rand(3)}}
    first = denoise(TinyEDM(), sampler, noise, **options)
    assert torch.equal(first, denoise(TinyEDM(), sampler, noise, **options))
    assert not torch.equal(first, denoise(TinyEDM(), sampler, noise, **(options | {"seed": 6})))
    assert torch.equal(
        first,
        denoise_in_batches(TinyEDM(), sampler, noise, num_inference_steps=None, **options),
    )


def test_noise_that_is_added_is_another_than_the_initial_one():
    class Adds:
        def sample(self, model, noise, conditions, generator):
            drawn = torch.randn(noise.shape, generator=generator)
            return model(sample=noise) * 0 + drawn

    data = Trajectories(
        lambda sample: sample, Adds(), num_trajectories=2, batch_size=2, seed=3, sample_shape=SHAPE
    )
    assert not torch.isclose(data.final_samples, next(iter(data))["sample"]).any()


def test_quantized_models_are_calibrated_and_compared_with_a_sampler():
    model, sampler = TinyEDM(), Heun()
    config = mpqdm_fx.MPQConfig(
        weight_bits=8, refinements=0, activation_mode="timestep", timestep_groups=3
    )
    quantized = mpqdm_fx.quantize(model, config, trajectories(sampler, held_out=2))
    assert quantized.noise_levels.count == 3
    fresh = trajectories(sampler, seed=7)
    assert epsilon_sqnr(model, quantized, fresh) > 25
    noise = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
    options = {"seed": 1, "conditions": {"difficulty": torch.rand(4)}}
    drawn = [denoise(each, sampler, noise, **options) for each in (model, quantized)]
    assert x0_sqnr(*drawn) > 15


def test_an_evaluation_takes_a_sampler_and_asks_for_no_steps():
    class Labelled(torch.nn.Module):
        def forward(self, noisy, sigma, class_labels):
            return (
                torch.tanh(noisy + class_labels[:, None, None, None]) / sigma[:, None, None, None]
            )

    run = run_reference(
        Labelled(), Consistency((8.0, 2.0)), sample_shape=SHAPE, num_samples=12, batch_size=4,
        rows_per_timestep=3,
    )  # fmt: skip
    assert run.num_inference_steps is None
    assert run.images.shape == (12, *SHAPE)
    assert len(concatenate(run.inputs)["noisy"]) == 6


class Broken:
    """A loop with one fault."""

    def __init__(self, body):
        self.body = body

    def sample(self, model, noise, conditions, generator):
        return self.body(model, noise, conditions)


def told(model, noise, conditions, **changes):
    return model(**{"noisy": noise, "sigma": torch.ones(len(noise)), **conditions, **changes})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda m, x, c: m(x, torch.ones(len(x)), **c), "positional.*model\\(noisy=x"),
        (lambda m, x, c: x, "without a call of the model"),
        (lambda m, x, c: told(m, x, c)[:1], r"returned \(1, 2, 6, 10\) for noise of shape \(4,"),
        (lambda m, x, c: [told(m, x, c)], "returned list for noise"),
        (lambda m, x, c: told(m, x, c, sigma=torch.tensor(1.0)), r"sigma of shape \(\).*expand"),
        (lambda m, x, c: told(m, x, c, sigma=torch.ones(3)), r"sigma of shape \(3,\).*4 runs"),
        (lambda m, x, c: told(m, x, c, sgima=1), "cannot be called.*sgima"),
        (lambda m, x, c: told(m, x, c) * float("nan"), "NaN or infinite samples"),
    ],
)
def test_a_faulty_loop_is_refused_by_what_it_does(body, message):
    with pytest.raises(CalibrationError, match=message):
        list(trajectories(Broken(body)))


def test_a_number_that_changes_from_call_to_call_is_refused():
    class Plain(torch.nn.Module):
        def forward(self, noisy, sigma):
            return noisy / sigma

    def body(model, noise, conditions):
        return model(noisy=model(noisy=noise, sigma=2.0), sigma=1.0)

    with pytest.raises(CalibrationError, match=r"2\.0 and 1\.0 have no rows.*a tensor where"):
        list(trajectories(Broken(body), Plain(), conditions=None))


@pytest.mark.parametrize(
    ("loop", "settings", "message"),
    [
        (Heun(), {"num_inference_steps": 5}, "Heun is a sampler.*leave num_inference_steps out"),
        (Heun(), {"guidance_scale": 2.0}, "Heun is a sampler.*leave guidance_scale out"),
        (DDIMScheduler(), {}, "DDIMScheduler needs num_inference_steps"),
        (object(), {}, r"no scheduler of diffusers, and no sampler.*sample\(model, noise"),
    ],
)
def test_what_belongs_to_the_other_kind_of_loop_is_refused(loop, settings, message):
    with pytest.raises(ConfigError, match=message):
        trajectories(loop, **settings)


def test_schedulers_are_no_samplers():
    assert is_sampler(Heun())
    assert not is_sampler(DDIMScheduler())
    assert not is_sampler(None)
