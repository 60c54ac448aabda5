"""A model that diffusers does not know, from its download to a program for phones.

python examples/stranger.py [ONNX] [--weights 4] [--output terrain.pte]

A one-step model of terrain heights, which is told a float sigma and no timestep (the module is in
benchmarks/terrain_model.py). Without the path of the ONNX file its package is downloaded with pip.
It takes minutes: a calibration of fewer runs, `--runs 2`, is quicker and a little worse.
"""

import argparse
import sys
from pathlib import Path

import torch

import mpqdm_fx
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.report.noise_levels import sqnr_by_noise_level
from mpqdm_fx.report.sample_metrics import x0_sqnr
from mpqdm_fx.sources.denoisers import runner_denoiser

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from terrain_model import SIGMAS, Renoising, load_terrain

parser = argparse.ArgumentParser()
parser.add_argument("onnx", nargs="?")
parser.add_argument("--weights", type=int, default=4)
parser.add_argument("--runs", type=int, default=8)
parser.add_argument("--output", type=Path, default=Path("terrain.pte"))
arguments = parser.parse_args()

network = load_terrain(arguments.onnx)


def runs(count: int, seed: int) -> mpqdm_fx.Trajectories:
    """The network's inputs along a loop of its own, one call at each sigma."""
    return mpqdm_fx.Trajectories(
        network,
        Renoising(SIGMAS),
        num_trajectories=count,
        batch_size=2,
        seed=seed,
        sample_shape=(1, 128, 128),
        conditions=lambda n, generator: {"difficulty": torch.rand(n, generator=generator)},
        shuffle=False,
        held_out=count // 4,
    )


config = mpqdm_fx.MPQConfig(weight_bits=arguments.weights, activation_mode="dynamic")
quantized = mpqdm_fx.quantize(network, config, runs(arguments.runs, seed=0))
print(f"{quantized.plan.effective_bits:.2f} effective bits")
for sigma, ratio in sqnr_by_noise_level(network, quantized, runs(2, seed=1)).items():
    print(f"sigma {sigma:g}: {ratio:.1f} dB")

program = mpqdm_fx.lower(quantized, "xnnpack", output=arguments.output)
print(f"{arguments.output}: {program.bytes:,} bytes, {program.subgraphs} delegates")

# from the same noise: the float network above, the program below
runner = runner_denoiser(XnnpackRunner(arguments.output), quantized.signature)
noise = torch.randn(4, 1, 128, 128, generator=torch.Generator().manual_seed(2))
difficulty = {"difficulty": torch.linspace(0.2, 0.95, 4)}
floats, pictures = (
    denoise(model, Renoising(), noise, seed=2, conditions=difficulty) for model in (network, runner)
)
print(f"terrains of the program: {x0_sqnr(floats, pictures):.1f} dB")
save_grid(torch.cat([floats, pictures]), arguments.output.with_suffix(".png"), columns=4, zoom=2)
