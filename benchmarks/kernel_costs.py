"""Time own kernels beside XNNPACK's dynamic int8 kernels: the rows of `backends/lowbit/costs.json`.

    pip install -e ".[bench]" ./native
    python benchmarks/kernel_costs.py --directory costs                # programs are kept there
    python benchmarks/kernel_costs.py --directory costs --instructions avx2

A chain of equal layers, random weights, one thread, both programs interleaved in one process; the
ratio of the medians, by shape and bits. Inputs are quantized in both. Prints the table's points.
"""

import argparse
import json
import logging
import math
import statistics
import time
from pathlib import Path

import torch
from machine import hide_dot_products
from torch import Tensor, nn

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

#: Height and width of the kernel (1: a linear layer), channels, positions.
SHAPES = (
    (3, 320, 4096),
    (3, 640, 1024),
    (3, 1280, 256),
    (3, 1280, 64),
    (3, 128, 1024),
    (3, 256, 256),
    (1, 1280, 256),
    (1, 320, 4096),
    (1, 320, 1),
    (1, 320, 8),
    (1, 1280, 1),
    (1, 1280, 4),
    (1, 1280, 8),
    (1, 1280, 16),
    (1, 2560, 1),
)
BITS = (2, 3, 4, 6, 7, 8)
LAYERS = 3  # with them the copies at a chain's ends count little
_INPUTS = 4  # channels of a chain's input


class Chain(nn.Module):
    """Equal layers behind each other, behind a small one: a model's first layer keeps floats."""

    def __init__(self, kernel: int, channels: int) -> None:
        super().__init__()
        if kernel == 1:
            layers: list[nn.Module] = [nn.Linear(_INPUTS, channels)]
            layers += [nn.Linear(channels, channels) for _ in range(LAYERS)]
        else:
            pad = kernel // 2
            layers = [nn.Conv2d(_INPUTS, channels, 1)]
            layers += [nn.Conv2d(channels, channels, kernel, padding=pad) for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers)

    def forward(self, sample: Tensor) -> Tensor:
        """All of them."""
        result: Tensor = self.layers(sample)
        return result


def example(kernel: int, rows: int) -> dict[str, Tensor]:
    """One call of a chain."""
    generator = torch.Generator().manual_seed(0)
    side = math.isqrt(rows)
    shape = (rows, _INPUTS) if kernel == 1 else (1, _INPUTS, side, side)
    return {"sample": torch.randn(shape, generator=generator)}


def build(directory: Path, shape: tuple[int, int, int], bits: int | None) -> Path:
    """A chain's program, on own kernels or (no bits) on XNNPACK's; one that is there is taken."""
    name = "x".join(map(str, shape))
    path = directory / f"{name}-{'xnnpack' if bits is None else bits}.pte"
    if path.exists():
        return path
    torch.manual_seed(0)
    kernel, channels, rows = shape
    call = example(kernel, rows)
    settings = MPQConfig(
        weight_bits=bits or 8,
        activation_mode="dynamic",
        allocation="uniform",
        levels="uniform",
        rounding="nearest",
        propagation=0.0,
        slowdown=1,
        judge=False,
    )
    quantized = quantize(Chain(kernel, channels).eval(), settings, [call])
    if bits is None:
        lower_xnnpack(quantized.rounded, quantized.ranges, call, path)
    else:
        program = lower_lowbit(quantized.rounded, quantized.ranges, call, path, kernels="memory")
        if len(program.own_layers) != LAYERS:
            raise RuntimeError(f"{path}: not all layers run in own kernels: {program.left_layers}")
    return path


def milliseconds(
    paths: dict[str, Path], call: dict[str, Tensor], seconds: float
) -> dict[str, float]:
    """Median of each program, interleaved, for about so long."""
    runners = {name: XnnpackRunner(path) for name, path in paths.items()}
    taken: dict[str, list[float]] = {name: [] for name in paths}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken["xnnpack"]) < 5:
        for name, runner in runners.items():
            start = time.perf_counter()
            runner(*call.values())
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in taken.items()}


def main() -> None:
    """Build what is missing, time every shape, print its point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("costs"))
    parser.add_argument("--instructions", choices=["avx2"], help="hide int8 dot products")
    parser.add_argument("--seconds", type=float, default=4, help="of timing for each shape")
    parser.add_argument("--build", action="store_true", help="make the programs, time nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    if arguments.instructions == "avx2":
        hide_dot_products()
    arguments.directory.mkdir(parents=True, exist_ok=True)

    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(1)
    for shape in SHAPES:
        paths = {
            "xnnpack" if bits is None else str(bits): build(arguments.directory, shape, bits)
            for bits in (None, *BITS)
        }
        if arguments.build:
            continue
        measured = milliseconds(paths, example(shape[0], shape[2]), arguments.seconds)
        times = {name: round(measured[name] / measured["xnnpack"], 2) for name in paths}
        del times["xnnpack"]
        point = dict(zip(("kernel", "channels", "rows"), shape, strict=True))
        print(json.dumps({**point, "time": times}), flush=True)


if __name__ == "__main__":
    main()
