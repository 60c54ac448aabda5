"""The quality table on the bundled model, or a DiT of digits: settings x methods, paired seeds.

    python benchmarks/quality.py --seeds 0 1 2 --output quality.json --resume
    python benchmarks/quality.py --model dit --settings W4A8 W2A8 --output digits_dit.json \
        --methods default+dynamic gptq+dynamic rtn+dynamic

Every cell is quantized from calibration trajectories of its seed and measured on held-out
trajectories and paired noise, the same for all cells of a seed. `--resume` skips the cells that the
output file already has; `--settings` and `--methods` choose some. Budgets: all methods of a setting
have the stored bits that uniform bits take with uniform levels, except that codebook tables come on
top where a method has them without a measured allocation.
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mpqdm_fx import MPQConfig, RunOptions, convert, prepare
from mpqdm_fx.digits.bundled import load_digits_classifier
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.model.quantized import PreparedModel, QuantizedModel
from mpqdm_fx.report.metrics import FeatureClassifier, evaluate_against
from mpqdm_fx.report.reference_run import EVALUATION_SEED, ReferenceRun, run_reference
from mpqdm_fx.sources.source import Source
from mpqdm_fx.sources.sources import load_source

SETTINGS = ("W8A8", "W4A8", "W3A8", "W2A8", "W3A6", "W2A6", "W4A4", "W2A4", "W4", "W3", "W2")
MODELS: Mapping[str, tuple[str, str | None]] = {
    "unet": ("digits", None),
    "dit": (str(Path(__file__).parent / "models" / "digits_dit"), "transformer"),
}
"""Name or folder, and subfolder."""

Change = Callable[[nn.Module, Iterable[Mapping[str, Any]]], nn.Module]

METRICS = ("epsilon_sqnr", "x0_sqnr", "frechet_distance", "accuracy")

#: The 1x1 convolutions beside residual blocks, whose input errors reach the output unhindered.
SHORTCUTS = {"pattern": "*conv_shortcut*", "activation_bits": 8}

_PLAIN = {
    "allocation": "uniform", "levels": "uniform", "refinements": 0, "propagation": 0.0,
    "bias_correction": False, "row_weights": "plain", "judge": False, "slowdown": 1,
    "activation_allocation": "uniform", "activation_levels": "uniform",
}  # fmt: skip
_AUTO = {**_PLAIN, "propagation": "auto", "bias_correction": True}
_FULL = {**_AUTO, "refinements": 4, "allocation": "measured", "levels": "codebook"}
_TIMESTEP = {**_FULL, "activation_mode": "timestep"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "default+entropy": {"weight_storage": "entropy"},
    "default+dynamic": {"activation_mode": "dynamic"},
    "rtn": {**_PLAIN, "rounding": "nearest"},
    "gptq": _PLAIN,
    "rtn+dynamic": {**_PLAIN, "rounding": "nearest", "activation_mode": "dynamic"},
    "gptq+dynamic": {**_PLAIN, "activation_mode": "dynamic"},
    "rtn+qep.5": {**_PLAIN, "rounding": "nearest", "propagation": 0.5, "bias_correction": True},
    "gptq+qep.5": {**_AUTO, "propagation": 0.5},
    "gptq+qep.auto": _AUTO,
    "auto+residuals": {**_AUTO, "residuals": True},
    "auto+omq": {**_AUTO, "allocation": "omq"},
    "auto+refine": {**_AUTO, "refinements": 4},
    "auto+refine+codebook": {**_AUTO, "refinements": 4, "levels": "codebook"},
    "auto+refine+measured": {**_FULL, "levels": "uniform"},
    "full": _FULL,
    "full+timestep": _TIMESTEP,
    "full+timestep+levels": {**_TIMESTEP, "activation_levels": "codebook"},
    "full+timestep+widths": {**_TIMESTEP, "activation_allocation": "measured"},
    "full+timestep+both": {
        **_TIMESTEP,
        "activation_levels": "codebook",
        "activation_allocation": "measured",
    },
    "full+timestep+shortcuts": {
        **_TIMESTEP,
        "overrides": [SHORTCUTS],
    },
    "full+dynamic": {**_FULL, "activation_mode": "dynamic"},
    "auto+refine+measured+dynamic": {**_FULL, "levels": "uniform", "activation_mode": "dynamic"},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cells of one seed share.

    Attributes:
        source: The model.
        prepared: It with its recorded calls.
        reference: Its held-out runs.
        classifier: Judge of the samples.
    """

    source: Source
    prepared: PreparedModel
    reference: ReferenceRun
    classifier: FeatureClassifier

    @classmethod
    def of(
        cls, seed: int, samples: int, model: str = "unet", change: Change | None = None
    ) -> "Bench":
        """Record the calibration runs of a seed, and run the float model on held-out ones.

        Args:
            seed: Of calibration and, moved far away, of evaluation.
            samples: That are drawn.
            model: One of `MODELS`.
            change: Makes of the model, and its calibration calls, one that computes the same.
        """
        source = load_source(*MODELS[model])
        classifier = load_digits_classifier()
        calibration = calibration_of(source, trajectories=16, steps=20, seed=seed)
        reference = run_reference(
            source.model,
            source.scheduler,
            num_samples=samples,
            batch_size=32,
            seed=EVALUATION_SEED + 100 * seed,
        )
        if change is not None:
            source = dataclasses.replace(source, model=change(source.model, calibration))
        prepared = prepare(source.model, MPQConfig(), next(iter(calibration)))
        for index, inputs in enumerate(calibration):
            held_out = index in calibration.held_out_calls
            with prepared.held_out() if held_out else contextlib.nullcontext():
                prepared.record(**inputs)
        return cls(source=source, prepared=prepared, reference=reference, classifier=classifier)

    def measured(self, quantized: QuantizedModel) -> dict[str, Any]:
        """The entries of a row that every cell has."""
        metrics = evaluate_against(
            self.reference, quantized, self.source.scheduler, self.classifier
        )
        return {**dataclasses.asdict(metrics), "effective_bits": quantized.plan.effective_bits}


def config_of(setting: str, method: str, seed: int) -> MPQConfig | None:
    """Settings of a cell; None where the cell does not exist."""
    weights, _, activations = setting[1:].partition("A")
    options = dict(METHODS[method])
    if activations == "8" and "overrides" in options:
        return None
    if not activations:
        if "activation_mode" in options:
            return None
        options["activation_mode"] = "float"
    return MPQConfig(
        weight_bits=int(weights), activation_bits=int(activations or 8), seed=seed, **options
    )


def measure(
    seed: int,
    settings: list[str],
    methods: list[str],
    samples: int,
    output: Path,
    folder: Path,
    model: str = "unet",
) -> None:
    """Quantize and measure every cell of one seed that is missing; write after each.

    Sensitivities depend on the kind of levels alone: they are measured once for each and kept in a
    file of the folder, so the seconds of all cells but the first of a kind are without them.
    """
    bench = Bench.of(seed, samples, model)
    cells = [(s, m) for s in settings for m in methods]
    for setting, method in tqdm(cells, desc=f"seed {seed}"):
        rows = read(output)
        key = f"{setting} {method} {seed}"
        config = config_of(setting, method, seed)
        if key in rows or config is None:
            continue
        start = time.perf_counter()
        bench.prepared.settings = config
        table_file = folder / f"sensitivity {config.levels}.safetensors"
        quantized = convert(bench.prepared, run=RunOptions(sensitivity=table_file))
        seconds = time.perf_counter() - start
        row = {
            **bench.measured(quantized),
            "weight_bytes": quantized.plan.weight_bytes,
            "float_bytes": quantized.plan.float_bytes,
            "seconds": seconds,
        }
        write_row(output, key, row)


def read(output: Path) -> dict[str, Any]:
    """Rows that the output file has."""
    return read_json(output) if output.exists() else {}


def write_row(output: Path, key: str, row: Mapping[str, Any]) -> None:
    """Add a row to the output file."""
    write_text(output, json.dumps({**read(output), key: row}, indent=1))


def columns(rows: Collection[Mapping[str, Any]]) -> str:
    """Mean and spread of each of `METRICS`, as columns of a Markdown table."""
    cells = []
    for metric in METRICS:
        values = [row[metric] for row in rows]
        digits = 3 if metric == "accuracy" else 2
        spread = max(values) - min(values)
        cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
    return " | ".join(cells)


def table(rows: Mapping[str, Any], seeds: list[int]) -> str:
    """Markdown table: mean and spread (largest minus smallest) over the seeds."""
    headings = (
        "setting", "method", "eps-SQNR dB", "x0-SQNR dB", "FD", "accuracy", "effective bits",
        "eps-MSE against gptq", "seeds",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for setting in SETTINGS:
        for method in METHODS:
            keys = {seed: f"{setting} {method} {seed}" for seed in seeds}
            runs = {seed: rows[key] for seed, key in keys.items() if key in rows}
            if not runs:
                continue
            bits = statistics.mean(row["effective_bits"] for row in runs.values())
            ratios = [
                10 ** ((rows[base]["epsilon_sqnr"] - row["epsilon_sqnr"]) / 10)
                for seed, row in runs.items()
                if (base := _base(rows, setting, method, seed)) in rows
            ]
            change = f"{100 * (statistics.mean(ratios) - 1):+.0f} %" if ratios else ""
            lines.append(
                f"| {setting} | {method} | {columns(runs.values())} | {bits:.3f} | {change} "
                f"| {len(runs)} |"
            )
    accuracy = statistics.mean(row["reference_accuracy"] for row in rows.values())
    lines.append(f"\nFloat model: accuracy {accuracy:.3f}.")
    return "\n".join(lines)


def _base(rows: Mapping[str, Any], setting: str, method: str, seed: int) -> str:
    """Key of the row that a row is compared with: GPTQ, with dynamic inputs where that is there."""
    key = f"{setting} gptq+dynamic {seed}"
    is_dynamic = METHODS[method].get("activation_mode") == "dynamic"
    return key if is_dynamic and key in rows else f"{setting} gptq {seed}"


def main() -> None:
    """Measure what is asked for and print the table of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--model", default="unet", choices=list(MODELS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("quality.json"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    if arguments.output.exists() and not (arguments.resume or arguments.table_only):
        parser.error(f"{arguments.output} exists: give --resume, or another file")
    if not arguments.table_only:
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                measure(
                    seed,
                    arguments.settings,
                    arguments.methods,
                    arguments.samples,
                    arguments.output,
                    Path(folder),
                    arguments.model,
                )
    print(table(read(arguments.output), arguments.seeds))


if __name__ == "__main__":
    main()
