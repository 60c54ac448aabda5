"""Lower a UNet of Stable Diffusion 1.5's size on a small machine, and run a step.

    python benchmarks/large_phone.py --directory large_phone
    python benchmarks/large_phone.py --directory try --narrower 4      # a quick try

860 M parameters, 64x64 latents, 77 tokens, seeded random weights: bytes, seconds, memory and
delegates, no quality. Each form is quantized (nearest, uniform bits), lowered and run in processes
of its own, so that every peak is its own. A form whose numbers are in the directory is not made
again. Numbers go to `<directory>/<form>.lower.json` and `<form>.run.json`.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from large_model import calls, model, peak_gib
from machine import anonymous_bytes, hide_dot_products

from mpqdm_fx import MPQConfig, quantize
from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.passes import NORMALIZE
from mpqdm_fx.passes.base import Pipeline

#: Bits of a weight, its levels, kind of activations and backend; None is the float program. XNNPACK
#: stores four-bit levels at four bits in linear layers and 1x1 convolutions of dynamic activations.
FORMS: Mapping[str, tuple[int, str, str, str] | None] = {
    "fp32": None,
    "W8A8-static": (8, "uniform", "static", "xnnpack"),
    "W8A8-dynamic": (8, "uniform", "dynamic", "xnnpack"),
    "W4A8-static": (4, "uniform", "static", "xnnpack"),
    "W4A8-dynamic": (4, "int4", "dynamic", "xnnpack"),
    "W3A8-dynamic": (3, "uniform", "dynamic", "xnnpack"),
    "W2A8-dynamic": (2, "uniform", "dynamic", "xnnpack"),
    **{f"W{bits}A8-own": (bits, "uniform", "dynamic", "lowbit") for bits in (8, 4, 3, 2)},
}


def lower_form(form: str, path: Path, narrower: int) -> dict[str, Any]:
    """Quantize and lower; this process's peak is that of both."""
    unet, data = model(narrower), calls()
    start = time.perf_counter()
    chosen = FORMS[form]
    if chosen is None:
        graph = Pipeline(passes=NORMALIZE)(trace(unet, data[0], dynamic_batch=False)).graph_module
        del unet
        program = lower_xnnpack_float(graph, data[-1], path)
        quantized_at = start
    else:
        settings = MPQConfig(
            weight_bits=chosen[0],
            levels=chosen[1],  # type: ignore[arg-type]
            activation_mode=chosen[2],  # type: ignore[arg-type]
            allocation="uniform",
            rounding="nearest",
            refinements=0,
            propagation=0.0,
            bias_correction=False,
            slowdown=1,
            judge=False,
        )
        quantized = quantize(unet, settings, data[::4])
        graph, ranges = quantized.rounded, quantized.ranges
        del unet, quantized
        quantized_at, before = time.perf_counter(), peak_gib()
        print(f"{form}: quantized, peak {before:.1f} GiB", flush=True)
        if chosen[3] == "lowbit":
            program = lower_lowbit(graph, ranges, data[-1], path, kernels="memory")
        else:
            program = lower_xnnpack(graph, ranges, data[-1], path)
    facts = program.to_dict()
    facts["inputs"] = facts["outputs"] = None
    seconds = time.perf_counter() - quantized_at
    return {**facts, "lowering_seconds": seconds, "lowering_peak_gib": peak_gib()}


def run_form(path: Path, steps: int, threads: int) -> dict[str, Any]:
    """Run steps; this process's peak is that of loading and running."""
    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(threads)
    idle, before = peak_gib(), anonymous_bytes()
    start = time.perf_counter()
    runner = XnnpackRunner(path)
    loaded = time.perf_counter() - start
    taken = []
    for call in calls()[: steps + 1]:
        start = time.perf_counter()
        runner(*call.values())
        taken.append(time.perf_counter() - start)
    return {
        "load_seconds": loaded,
        "first_step_seconds": taken[0],
        "step_seconds": statistics.median(taken[1:]),
        "running_peak_gib": peak_gib() - idle,
        "running_anonymous_gib": (anonymous_bytes() - before) / 2**30,
        "threads": threads,
    }


def main() -> None:
    """Make what is missing, each in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--narrower", type=int, default=1, help="divide all widths, to try it out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instructions", choices=["avx2"], help="hide int8 dot products")
    parser.add_argument("--task", choices=["lower", "run"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(arguments.threads)
    if arguments.instructions == "avx2":
        hide_dot_products()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for form in arguments.forms:
        path = arguments.directory / f"{form}.pte"
        if arguments.task is None:
            for task in ("lower", "run"):
                if not path.with_suffix(f".{task}.json").exists():
                    again = [sys.executable, *sys.argv, "--task", task, "--forms", form]
                    subprocess.run(again, check=True)
            continue
        if arguments.task == "lower":
            numbers = lower_form(form, path, arguments.narrower)
        else:
            numbers = run_form(path, arguments.steps, arguments.threads)
        path.with_suffix(f".{arguments.task}.json").write_text(json.dumps(numbers, indent=1))
    if arguments.task is None:
        print_table(arguments.directory, arguments.forms)


def print_table(directory: Path, forms: list[str]) -> None:
    """One row per form."""
    print(
        "| form | bytes | subgraphs | outside | lowering s | peak GiB | step s | running GiB | dB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for form in forms:
        lowering, running = (
            json.loads((directory / f"{form}.{task}.json").read_text()) for task in ("lower", "run")
        )
        print(
            f"| {form} | {lowering['bytes']} | {lowering['subgraphs']} | {lowering['undelegated']} "
            f"| {lowering['lowering_seconds']:.0f} | {lowering['lowering_peak_gib']:.1f} "
            f"| {running['step_seconds']:.2f} | {running['running_peak_gib']:.2f} "
            f"| {lowering['sqnr_db']:.1f} |"
        )


if __name__ == "__main__":
    main()
