"""One graph for schedulers with whole and with fractional timesteps, where the model allows it."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from small import TinyDenoiser, denoiser_calls, tiny_unet, unet_calls
from torch import nn

from mpqdm_fx import MPQConfig, load, prepare, quantize, save
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.capture.trace import same_bits, trace
from mpqdm_fx.errors import TraceError


class LooksUp(TinyDenoiser):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(1000, 8)

    def forward(self, sample, timestep):
        h = self.conv_in(sample) + self.table(timestep)[:, :, None, None]
        return self.conv_out(self.act(h))


class Branches(TinyDenoiser):
    def forward(self, sample, timestep):
        if timestep.is_floating_point():  # fractions of the schedule
            timestep = timestep * 1000
        return super().forward(sample, timestep)


def dtype_of(model, calls):
    prepared = prepare(model, MPQConfig(), calls[0])
    return prepared.signature.spec("timestep").dtype


@pytest.mark.parametrize(
    ("model", "calls"), [(TinyDenoiser, denoiser_calls), (tiny_unet, unet_calls)]
)
def test_whole_and_fractional_timesteps_give_the_models_bits(model, calls):
    model, call = model(), calls(1)[0]
    graph_module = trace(model, call, fractional_timesteps=True)
    signature = graph_module.meta["signature"]
    assert signature.spec("timestep").dtype == torch.float32
    for shift in (0, 0.25):
        given = {**call, "timestep": call["timestep"] + shift}
        options = {"return_dict": False} if "return_dict" in signature.parameters else {}
        with torch.no_grad():
            expected = model(**given, **options)
            assert same_bits(graph_module(**signature.normalize((), given)), expected)


def test_a_graph_that_was_traced_with_whole_timesteps_truncates_no_fraction():
    graph_module = trace(TinyDenoiser(), denoiser_calls(1)[0])
    signature = graph_module.meta["signature"]
    with pytest.raises(TraceError, match=r"timestep is torch\.float32, but was traced as"):
        signature.normalize((), {**denoiser_calls(1)[0], "timestep": 3.5})


@pytest.mark.parametrize("kind", [LooksUp, Branches])
def test_a_model_that_tells_the_dtypes_apart_stays_with_the_examples(kind):
    assert dtype_of(kind(), denoiser_calls(1)) == torch.int64


def test_a_model_that_was_calibrated_with_whole_timesteps_draws_with_either_scheduler(tmp_path):
    model = TinyDenoiser()
    quantized = quantize(model, MPQConfig(weight_bits=8, refinements=0), denoiser_calls())
    assert dtype_of(model, denoiser_calls(1)) == torch.float32
    save(quantized, tmp_path / "packed")
    loaded = load(tmp_path / "packed", TinyDenoiser())
    noise = torch.randn(2, 2, 6, 10, generator=torch.Generator().manual_seed(0))
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(timestep_spacing="linspace")):
        drawn = [
            denoise(denoiser, scheduler, noise, num_inference_steps=7, seed=0)
            for denoiser in (quantized, loaded)
        ]
        assert torch.equal(*drawn)
        assert bool(torch.isfinite(drawn[0]).all())
    scheduler.set_timesteps(7)
    assert not torch.equal(scheduler.timesteps, scheduler.timesteps.round())
