"""Denoisers of every form: any batch, and samples whose noise is their own."""

import dataclasses

import torch
from diffusers import EulerAncestralDiscreteScheduler
from small import TinyNet, net_calls

import mpqdm_fx
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.model.stages import normalized
from mpqdm_fx.sources.denoisers import draw, runner_denoiser
from mpqdm_fx.sources.source import Source


def test_later_batches_get_ancestral_noise_of_their_own():
    inputs = {"sample": torch.zeros(2, 1, 8, 8), "timestep": torch.zeros(2, dtype=torch.int64)}
    scheduler = EulerAncestralDiscreteScheduler()
    source = Source(
        name="nothing", model=None, scheduler=scheduler, example_inputs=inputs,
        sample_shape=(1, 8, 8),
    )  # fmt: skip
    drawn = draw(source, lambda sample, timestep: 0 * sample, num=6, steps=3, seed=4, batch_size=2)
    # a model that predicts no noise changes nothing: what is left is the start and what was added
    noise = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    scheduler.set_timesteps(3)
    first, *rest = torch.split(drawn - noise * scheduler.init_noise_sigma, 2)
    assert float(first.std()) > 1
    for later in rest:
        assert not torch.isclose(first, later, atol=1e-3).all()
        correlation = torch.corrcoef(torch.stack([first.flatten(), later.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.4


def test_a_program_takes_batches_beyond_the_traced_range(tmp_path):
    model = TinyNet().eval()
    (inputs,) = net_calls(calls=1, batch=5)
    graph = normalized(model, inputs, mpqdm_fx.MPQConfig())
    # UNets that upsample are traced for less than 64 samples; this net takes any number
    signature = dataclasses.replace(graph.meta["signature"], batch_range=(1, 2))
    program = lower_xnnpack_float(
        graph, example_inputs(signature, batch_size=1), tmp_path / "net.pte"
    )
    (output,) = runner_denoiser(XnnpackRunner(program.path), signature)(**inputs)
    with torch.no_grad():
        assert torch.allclose(output, model(**inputs), rtol=1e-3, atol=1e-4)
