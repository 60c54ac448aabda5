"""Denoisers of every form: any batch, and samples whose noise is their own."""

import torch
from diffusers import EulerAncestralDiscreteScheduler
from manifests import edit_manifest
from small import TinyNet, net_calls

import mpqdm_fx
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.denoisers import draw, program_denoiser
from mpqdm_fx.folders import open_folder, seal_folder
from mpqdm_fx.graph.calling import example_inputs
from mpqdm_fx.models.sources import Source


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
    for other in rest:
        assert not torch.isclose(first, other, atol=1e-3).all()
        correlation = torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.4


def test_a_program_takes_batches_beyond_the_traced_range(tmp_path):
    model = TinyNet().eval()
    (inputs,) = net_calls(calls=1, batch=5)
    settings = mpqdm_fx.MPQConfig(weight_bits=8, allocation="uniform", activation_mode="float")
    root = mpqdm_fx.save(mpqdm_fx.quantize(model, settings, net_calls()), tmp_path / "net")
    quantized = mpqdm_fx.load(root)
    example = example_inputs(quantized.signature, batch_size=1)
    lower_xnnpack_float(quantized.rounded, example, root / "unet.pte")
    seal_folder(root)
    # UNets that upsample are traced for less than 64 samples; this net takes any number
    edit_manifest(root, lambda manifest: manifest["signature"].update(batch_range=[1, 2]))
    (found,) = program_denoiser(open_folder(root))(**inputs)
    with torch.no_grad():
        assert torch.allclose(found, quantized(**inputs), rtol=1e-3, atol=1e-4)
