"""Training with sampling loops of one's own: what is recorded, weighed, and learned."""

import dataclasses

import pytest
import torch
from diffusers import DDIMScheduler
from interruption import kill_at
from samplers import Consistency, Guided, Heun
from small import SIGMAS, TinyEDM, edm_calls

import mpqdm_fx
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.distill.importance import measure_effects
from mpqdm_fx.distill.runs import Recorder, Start
from mpqdm_fx.errors import CalibrationError, ConfigError

SETTINGS = mpqdm_fx.MPQConfig(
    weight_bits=1, allocation="uniform", rounding="nearest", propagation=0.0, bias_correction=False,
    activation_bits=4, overrides=[{"pattern": "*", "weight_bits": 1}], row_weights="plain",
    judge=False,
)  # fmt: skip
CONFIG = DistillConfig(updates=6, trajectories=4, batch_size=8, rank=2, ema=0.5, held_out=4)
DIFFICULTY = {"difficulty": torch.linspace(0, 1, 4)}


@pytest.fixture(scope="module")
def quantized():
    return mpqdm_fx.quantize(TinyEDM(), SETTINGS, edm_calls())


def trained(quantized, sampler, directory=None, **settings):
    return distill(
        quantized, TinyEDM(), dataclasses.replace(CONFIG, **settings), scheduler=sampler,
        sample_shape=(2, 6, 10), conditions=DIFFICULTY, directory=directory,
    )  # fmt: skip


def start(runs=4):
    noise = torch.randn(runs, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    return Start(noise=noise, conditions=DIFFICULTY, unconditional=None, seed=0)


def recorder(sampler, batch_size=4):
    return Recorder(
        teacher=TinyEDM(), scheduler=sampler, steps=20, guidance_scale=None, batch_size=batch_size
    )


@pytest.mark.parametrize(("sampler", "calls"), [(Heun(), 9), (Guided(), 18), (Consistency(), 1)])
def test_every_call_is_an_example_with_the_float_models_answer(sampler, calls):
    runs = recorder(sampler, batch_size=3).record(TinyEDM(), start())
    assert runs.calls == calls
    for call in range(calls):
        batch = runs.batch(torch.tensor([3, 0]), torch.full((2,), call))
        assert set(batch.inputs) == {"noisy", "sigma", "difficulty"}
        with torch.no_grad():
            assert torch.allclose(TinyEDM()(**batch.inputs), batch.target, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", [Heun(), Guided()])
def test_effects_are_measured_for_every_example(sampler):
    runs = recorder(sampler)
    effects = measure_effects(TinyEDM(seed=1), runs, start())
    calls = runs.record(runs.teacher, start()).calls
    assert effects.moved.shape == effects.error.shape == (calls,)
    assert bool((effects.moved > 0).all())
    assert bool((effects.error > 0).all())


@pytest.mark.parametrize("sampler", [Heun(), Consistency(SIGMAS), Guided()])
def test_training_lowers_the_error_on_runs_that_it_has_not_seen(quantized, sampler):
    result = trained(
        quantized, sampler, updates=600, base="float", ema=0.0, correct_mean=False, final_share=0.0
    )
    assert result.after < 0.9 * result.before
    assert result.improved
    assert result.quantized.plan == quantized.plan


def test_an_interrupted_run_goes_on_to_the_same_bits(quantized, tmp_path, monkeypatch):
    settings = {"on_policy": 0.5, "refresh": 4}
    whole = trained(quantized, Heun(), **settings)
    kill_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        trained(quantized, Heun(), tmp_path, **settings)
    monkeypatch.undo()
    resumed = trained(quantized, Heun(), tmp_path, **settings)
    assert resumed.history.resumed == 3
    call = edm_calls(1)[0]
    with torch.no_grad():
        assert torch.equal(resumed.quantized(**call), whole.quantized(**call))
    with pytest.raises(ConfigError):  # another schedule is another run
        trained(quantized, Heun((40.0, 2.0, 0.0)), tmp_path, **settings)


def test_guidance_belongs_into_the_sampler(quantized):
    with pytest.raises(ConfigError, match=r"Heun is a sampler.*guidance_scale"):
        trained(quantized, Heun(), guidance_scale=2.0)


def test_a_scheduler_without_a_timestep_is_refused_by_what_the_model_takes(quantized):
    with pytest.raises(ConfigError, match=r"takes \(noisy, sigma, difficulty\).*give a Sampler"):
        trained(quantized, DDIMScheduler())


def test_a_loop_with_another_number_of_calls_in_each_batch_is_refused(quantized):
    class Adaptive(Consistency):
        def sample(self, model, noise, conditions, generator):
            self.sigmas = SIGMAS[: len(noise)]
            return super().sample(model, noise, conditions, generator)

    with pytest.raises(CalibrationError, match=r"Adaptive calls the model 1 times.*and 3 times"):
        trained(quantized, Adaptive(), batch_size=3)
