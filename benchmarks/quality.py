"""The quality table on the bundled model: settings x allocation x levels, paired seeds.

    python benchmarks/quality.py --seeds 3 --output quality.json

Every cell is quantized from calibration trajectories of its seed and measured on held-out
trajectories and paired noise, the same for all cells of a seed. `--resume` skips cells that the
output file already has.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mpqdm_fx import MPQConfig, convert, prepare
from mpqdm_fx.models.bundled import load_digits_classifier
from mpqdm_fx.models.sources import load_source
from mpqdm_fx.report.metrics import EVALUATION_SEED, evaluate_against, run_reference
from mpqdm_fx.workflow import calibration_of

SETTINGS = ((8, 8), (4, 8), (3, 6), (2, 6))
ALLOCATIONS = ("uniform", "omq")
LEVELS = ("uniform", "codebook")
METRICS = ("epsilon_sqnr", "x0_sqnr", "frechet_distance", "accuracy")


def cells() -> list[tuple[int, int, str, str]]:
    """All rows of the table; at 8 bits a codebook and a mix do not exist."""
    return [
        (weights, activations, allocation, levels)
        for (weights, activations), allocation, levels in itertools.product(
            SETTINGS, ALLOCATIONS, LEVELS
        )
        if weights < 8 or (allocation, levels) == ("uniform", "uniform")
    ]


def measure(seed: int, samples: int, rows: dict[str, Any], output: Path) -> None:
    """Quantize and measure every cell of one seed; write after each."""
    source = load_source("digits")
    classifier = load_digits_classifier()
    calibration = calibration_of(source, trajectories=16, steps=20, seed=seed)
    reference = run_reference(
        source.model,
        source.scheduler,
        num_samples=samples,
        batch_size=32,
        seed=EVALUATION_SEED + 100 * seed,
    )
    prepared = prepare(source.model, MPQConfig(), next(iter(calibration)))
    for inputs in calibration:
        prepared.record(**inputs)
    for weights, activations, allocation, levels in tqdm(cells(), desc=f"seed {seed}"):
        key = f"W{weights}A{activations} {allocation} {levels} {seed}"
        if key in rows:
            continue
        start = time.perf_counter()
        prepared.settings = MPQConfig(
            weight_bits=weights,
            activation_bits=activations,
            allocation=allocation,
            levels=levels,
            seed=seed,
        )
        quantized = convert(prepared)
        result = evaluate_against(reference, quantized, source.scheduler, classifier)
        chosen = [layer for layer in quantized.plan.layers if layer.reason is None]
        rows[key] = {
            **dataclasses.asdict(result),
            "effective_bits": quantized.plan.effective_bits,
            "weight_bytes": quantized.plan.weight_bytes,
            "float_bytes": quantized.plan.float_bytes,
            "mixed_layers": sum(layer.fraction > 0 for layer in chosen),
            "codebook_layers": sum(layer.levels == "codebook" for layer in chosen),
            "layers": len(chosen),
            "seconds": time.perf_counter() - start,
        }
        output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def table(rows: dict[str, Any], seeds: list[int]) -> str:
    """Markdown table: mean and spread (largest minus smallest) over the seeds."""
    headings = (
        "setting", "allocation", "levels", "eps-SQNR dB", "x0-SQNR dB", "FD", "accuracy",
        "effective bits", "bytes", "mixed / codebook layers",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for weights, activations, allocation, levels in cells():
        setting = f"W{weights}A{activations}"
        found = [
            rows[key]
            for seed in seeds
            if (key := f"{setting} {allocation} {levels} {seed}") in rows
        ]
        if not found:
            continue
        columns = []
        for metric in METRICS:
            values = [row[metric] for row in found]
            digits = 3 if metric == "accuracy" else 2
            spread = max(values) - min(values)
            columns.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        bits = statistics.mean(row["effective_bits"] for row in found)
        size = statistics.mean(row["weight_bytes"] + row["float_bytes"] for row in found)
        mixed = statistics.mean(row["mixed_layers"] for row in found)
        fitted = statistics.mean(row["codebook_layers"] for row in found)
        lines.append(
            f"| {setting} | {allocation} | {levels} | {' | '.join(columns)} | {bits:.3f} | "
            f"{size:,.0f} | {mixed:.0f} / {fitted:.0f} of {found[0]['layers']} |"
        )
    float_accuracy = statistics.mean(row["reference_accuracy"] for row in rows.values())
    lines.append(f"\nFloat model: accuracy {float_accuracy:.3f}; {len(seeds)} seeds.")
    return "\n".join(lines)


def main() -> None:
    """Measure the seeds that are asked for and print the table of all that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    if arguments.resume and arguments.output.exists():
        rows = json.loads(arguments.output.read_text(encoding="utf-8"))
    for seed in arguments.seeds:
        measure(seed, arguments.samples, rows, arguments.output)
    print(table(rows, arguments.seeds))


if __name__ == "__main__":
    main()
