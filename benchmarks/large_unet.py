"""Quantize a UNet of Stable Diffusion 1.5's size on a small machine; time and peak memory.

    python benchmarks/large_unet.py --weights 4 --directory run_w4
    python benchmarks/large_unet.py --weights 4 --directory run_w4 --resume    # after a kill

860 M parameters, 64x64 latents, seeded random weights (no hub is needed), 8 calibration inputs at
8 timesteps, the whole recipe. Random weights say nothing about quality; the output error is printed
to show that the result computes. Numbers go to `<directory>/result.json`.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from large_model import calls, model, peak_gib

from mpqdm_fx import MPQConfig, RunOptions, convert, prepare
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.sweep.estimate import estimate


def main() -> None:
    """Quantize, measure, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--sensitivity", type=Path, help="file that another width can use again")
    parser.add_argument("--narrower", type=int, default=1, help="divide all widths, to try it out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    unet = model(arguments.narrower)
    data = calls()
    settings = MPQConfig(
        weight_bits=arguments.weights,
        activation_bits=arguments.activations,
        allocation="measured",
    )
    prepared = prepare(unet, settings, data[0])
    for call in data:
        prepared.record(**call)
    plan = estimate(prepared.graph_module, list(prepared.records), settings)
    print(f"expected: {json.dumps(plan.to_dict(), indent=1)}", flush=True)
    print(f"traced: {time.perf_counter() - start:.0f} s, peak {peak_gib():.1f} GiB", flush=True)
    quantized = convert(
        prepared,
        run=RunOptions(
            directory=arguments.directory,
            resume=arguments.resume,
            sensitivity=arguments.sensitivity,
        ),
    )
    seconds, peak = time.perf_counter() - start, peak_gib()
    with torch.no_grad():
        expected, actual = unet(**data[-1]).sample, quantized(**data[-1]).sample
    layers = quantized.plan.layers
    result = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "layers": len(layers),
        "layers_in_float": sum(tensor.is_weight for tensor in quantized.plan.floats),
        "effective_bits": quantized.plan.effective_bits,
        "expected_seconds": plan.seconds,
        "seconds": seconds,
        "expected_peak_gib": plan.peak_bytes / 2**30,
        "peak_gib": peak,
        "resumed": arguments.resume,
        "threads": arguments.threads,
        "output_sqnr_db": sqnr_db(expected, actual),
    }
    (arguments.directory / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
