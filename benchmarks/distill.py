"""Distillation on the bundled model: settings x recipes, paired seeds, equal updates and data.

    python benchmarks/distill.py --seeds 0 1 2 --output distill.json --resume

Every cell is quantized, trained for the same number of updates on the float model's runs of its
seed, and measured on held-out runs and paired noise, like the cells of `quality.py`.
"""

import argparse
import functools
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quality import SHORTCUTS, Bench, Change, columns, read, write_row
from shifted_shortcuts import with_shifts
from tqdm import tqdm

from mpqdm_fx import MPQConfig, RunOptions, convert
from mpqdm_fx.distill.config import DistillConfig
from mpqdm_fx.distill.distillation import distill
from mpqdm_fx.model.quantized import QuantizedModel

SETTINGS = ("W2A4", "W2A6", "W3A4", "W3A6", "W4A4", "W4A8")

#: Evenly spaced codes of one width, as the published baseline has them.
_FULL: Mapping[str, Any] = {"activation_allocation": "uniform", "activation_levels": "uniform"}
_RTN = {
    "allocation": "uniform", "levels": "uniform", "rounding": "nearest", "refinements": 0,
    "propagation": 0.0, "bias_correction": False, **_FULL,
}  # fmt: skip
_SHORTCUTS: Mapping[str, Any] = {"overrides": [SHORTCUTS], **_FULL}
_WIDTHS: Mapping[str, Any] = {"activation_allocation": "measured", "activation_levels": "uniform"}
_LEVELS: Mapping[str, Any] = {"activation_allocation": "uniform"}
_INPUTS: Mapping[str, Any] = {"activation_allocation": "measured"}  # a width and levels each
_CODED: Mapping[str, Any] = {**_INPUTS, "weight_storage": "entropy"}
#: Its trained parts at our rates: its own are made for a hundred times the updates.
_EFFICIENTDM: Mapping[str, Any] = {
    "recipe": "efficientdm", "absolute_rates": False,
    **{f"{part}_rate": getattr(DistillConfig(updates=1), f"{part}_rate")
       for part in ("weight", "scale", "range")},
}  # fmt: skip
#: Start and training of each recipe.
RECIPES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {
    "efficientdm, its rates": (_RTN, {"recipe": "efficientdm"}),
    "efficientdm": (_RTN, _EFFICIENTDM),
    "efficientdm+omq": ({**_RTN, "allocation": "omq"}, _EFFICIENTDM),
    "efficientdm+measured": ({**_RTN, "allocation": "measured"}, _EFFICIENTDM),
    "efficientdm+start": (_FULL, _EFFICIENTDM),
    "untrained": (_FULL, None),
    "ours": (_FULL, {}),
    "ours+trd": (_FULL, {"relation": "trd"}),
    "ours+queue": (_FULL, {"relation": "queue"}),
    "ours+feature": (_FULL, {"relation": "feature"}),
    "ours, steps alike": (_FULL, {"final_share": 0.0}),
    "ours, stochastic": (_FULL, {"rounding": "stochastic"}),
    "ours, rtn start": (_RTN, {}),
    "untrained+levels": (_LEVELS, None),
    "untrained+widths": (_WIDTHS, None),
    "untrained+inputs": (_INPUTS, None),
    "untrained+coded": (_CODED, None),
    "ours+levels": (_LEVELS, {}),
    "ours+widths": (_WIDTHS, {}),
    "ours+inputs": (_INPUTS, {}),
    "ours+coded": (_CODED, {}),
    "untrained+shift": (_INPUTS, None),
    "ours+shift": (_INPUTS, {}),
    "untrained+shortcuts": (_SHORTCUTS, None),
    "ours+shortcuts": (_SHORTCUTS, {}),
}


def training(options: Mapping[str, Any], seed: int, updates: int) -> DistillConfig:
    """Settings of a recipe's training."""
    settings = {
        "seed": 10 + seed, "updates": updates, "trajectories": 64, "keep_better": False, **options,
    }  # fmt: skip
    if settings.pop("recipe", None) == "efficientdm":
        return DistillConfig.efficientdm(**settings)
    return DistillConfig(**settings)


def _start(
    bench: Bench, seed: int, sensitivity: Path, setting: str, options: str
) -> QuantizedModel:
    """What training starts from; recipes that start alike share it."""
    weights, _, activations = setting[1:].partition("A")
    bench.prepared.settings = MPQConfig(
        weight_bits=int(weights), activation_bits=int(activations), seed=seed,
        activation_mode="timestep", timestep_groups=5, row_weights="plain", judge=False,
        **json.loads(options),
    )  # fmt: skip
    return convert(bench.prepared, run=RunOptions(sensitivity=sensitivity))


def measure(
    seed: int, settings: list[str], recipes: list[str], updates: int, samples: int, output: Path
) -> None:
    """Quantize, train and measure every cell of one seed that is missing; write after each."""

    @functools.cache
    def bench_of(change: Change | None) -> Bench:
        return Bench.of(seed, samples, change=change)

    cells = [(s, r) for s in settings for r in recipes]
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def quantize(change: Change | None, setting: str, options: str) -> QuantizedModel:
            table = Path(folder) / f"sensitivity {change is None}.safetensors"
            return _start(bench_of(change), seed, table, setting, options)

        for setting, recipe in tqdm(cells, desc=f"seed {seed}"):
            key = f"{setting} {recipe} {seed}"
            if (there := read(output).get(key)) is not None:
                if there["updates"] not in (0, updates):
                    raise SystemExit(
                        f"{output}: {key} has {there['updates']} updates, not {updates}"
                    )
                continue
            start, trained = RECIPES[recipe]
            change = with_shifts if recipe.endswith("+shift") else None
            bench, quantized = bench_of(change), quantize(change, setting, json.dumps(start))
            row: dict[str, Any] = {"updates": 0}
            clock = time.perf_counter()
            if trained is not None:
                result = distill(
                    quantized,
                    bench.source.model,
                    training(trained, seed, updates),
                    scheduler=bench.source.scheduler,
                    sample_shape=bench.source.sample_shape,
                    conditions={"class_labels": torch.arange(64) % 10},
                )
                quantized = result.quantized
                row = {"updates": updates, "before": result.before, "after": result.after}
            row["seconds"] = time.perf_counter() - clock
            row["input_bits"] = quantized.report.input_bits or [float(setting[-1])] * 2
            write_row(output, key, row | bench.measured(quantized))


def table(rows: Mapping[str, Any], seeds: list[int]) -> str:
    """Markdown table: mean and spread (largest minus smallest) over the seeds."""
    heads = "setting | recipe | eps-SQNR dB | x0-SQNR dB | FD | accuracy | bits | seconds | seeds"
    more = ("median x0 dB", "input bits, elements", "input bits, multiply-adds")
    has_more = all("input_bits" in row for row in rows.values())
    heads = " | ".join((heads, *more)) if has_more else heads
    lines = [f"| {heads} |", "|---" * len(heads.split("|")) + "|"]
    for setting in SETTINGS:
        for recipe in RECIPES:
            runs = [rows[k] for s in seeds if (k := f"{setting} {recipe} {s}") in rows]
            if not runs:
                continue
            bits = statistics.mean(row["effective_bits"] for row in runs)
            seconds = statistics.mean(row["seconds"] for row in runs)
            cells = [setting, recipe, columns(runs), f"{bits:.3f}", f"{seconds:.0f}", len(runs)]
            if has_more:
                cells.append(f"{statistics.mean(row['x0_median_sqnr'] for row in runs):.2f}")
                widths = zip(*(row["input_bits"] for row in runs), strict=True)
                cells += [f"{statistics.mean(width):.2f}" for width in widths]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for and print the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("distill.json"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if arguments.output.exists() and not arguments.resume:
        parser.error(f"{arguments.output} exists: give --resume, or another file")
    for seed in arguments.seeds:
        measure(
            seed, arguments.settings, arguments.recipes, arguments.updates, arguments.samples,
            arguments.output,
        )  # fmt: skip
    print(table(read(arguments.output), arguments.seeds))


if __name__ == "__main__":
    main()
