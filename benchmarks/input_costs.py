"""What inputs of few bits cost on the fake-quantized graph, and which of them a program runs.

    python benchmarks/input_costs.py --output input_costs.json

The bundled model, 32 rows a call, one thread. All graphs are called in turn in one process: the
median time of a call over that of the float graph within a round, with quartiles. Memory is by how
much a call raises the peak of the process. The folder's bytes are those beyond a folder of float
inputs: scales, zero points, widths and levels.
"""

import argparse
import functools
import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpqdm_fx import MPQConfig, QuantizedModel, quantize, save
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack
from mpqdm_fx.errors import MPQError
from mpqdm_fx.io.allocator import large_blocks_returned
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.peak_memory import peak_rise
from mpqdm_fx.jobs.calibration import calibration_of
from mpqdm_fx.report.timing import milliseconds_by_round
from mpqdm_fx.sources.sources import load_source

ROWS = 32
_EVEN: Mapping[str, Any] = {"activation_allocation": "uniform", "activation_levels": "uniform"}
_FOUR: Mapping[str, Any] = {"activation_bits": 4, "activation_mode": "static"}
_GROUPS: Mapping[str, Any] = {"activation_mode": "timestep", "timestep_groups": 5}

#: Settings by row of the table; the first one is what the others are compared with.
INPUTS: Mapping[str, Mapping[str, Any]] = {
    "float": {"activation_mode": "float"},
    "8 bits, dynamic": {**_EVEN, "activation_mode": "dynamic"},
    "8 bits, static": {**_EVEN, "activation_mode": "static"},
    "8 bits, by noise level": {**_EVEN, **_GROUPS},
    "4 bits": {**_EVEN, **_FOUR},
    "4 bits, fitted levels": {**_FOUR, "activation_allocation": "uniform"},
    "4 bits, widths": {**_FOUR, "activation_levels": "uniform"},
    "4 bits, both": _FOUR,
    "4 bits, both, by noise level": {**_FOUR, **_GROUPS},
}


def quantized_models() -> dict[str, QuantizedModel]:
    """The bundled model by kind of inputs, with nearest rounding to two bits."""
    source = load_source("digits")
    calls = list(calibration_of(source, trajectories=8, steps=10, seed=0))
    common = MPQConfig(
        weight_bits=2, allocation="uniform", levels="uniform", refinements=0, propagation=0.0,
        bias_correction=False, row_weights="plain", judge=False, slowdown=1.0,
    ).to_dict()  # fmt: skip
    return {
        name: quantize(source.model, MPQConfig(**{**common, **options}), calls)
        for name, options in INPUTS.items()
    }


def folder_bytes(quantized: QuantizedModel) -> int:
    """Bytes of all files of a saved folder."""
    with tempfile.TemporaryDirectory() as directory:
        folder = save(quantized, Path(directory) / "folder")
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def refusal(quantized: QuantizedModel, inputs: Mapping[str, torch.Tensor]) -> str | None:
    """Why no program runs it; None where one does."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            lower_xnnpack(
                quantized.rounded, quantized.ranges, inputs, Path(directory) / "model.pte"
            )
        except MPQError as error:
            return str(error)
    return None


def _peak_of(call: Callable[[], object]) -> int:
    """Bytes by which a call raises the peak, where nothing freed before is left to be used."""
    with large_blocks_returned():
        pass
    return peak_rise(call)


def measure(rounds: int) -> dict[str, Any]:
    """Rows by kind of inputs."""
    models = quantized_models()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(ROWS, 1, 16, 16, generator=generator),
        "timestep": torch.linspace(999, 0, ROWS).long(),
        "class_labels": torch.arange(ROWS) % 10,
    }
    times = milliseconds_by_round(models, inputs, rounds=rounds)
    with torch.no_grad():
        peaks = {
            name: _peak_of(functools.partial(model, **inputs)) for name, model in models.items()
        }
    first = next(iter(INPUTS))
    sizes = {name: folder_bytes(model) for name, model in models.items()}
    rows: dict[str, Any] = {}
    for name, model in models.items():
        ratios = [own / other for own, other in zip(times[name], times[first], strict=True)]
        rows[name] = {
            "milliseconds": statistics.median(times[name]),
            "ratio": statistics.quantiles(ratios, n=4),
            "peak_bytes": peaks[name],
            "stored_bytes": sizes[name] - sizes[first],
            "refusal": refusal(model, inputs),
        }
    return rows


def table(rows: Mapping[str, Any]) -> str:
    """Markdown table."""
    lines = [
        "| inputs | ms a call | over float (quartiles) | peak MiB | bytes stored | int8 program |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        low, middle, high = row["ratio"]
        program = "runs" if row["refusal"] is None else "refused"
        lines.append(
            f"| {name} | {row['milliseconds']:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) "
            f"| {row['peak_bytes'] / 2**20:.0f} | {row['stored_bytes']:,} | {program} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("input_costs.json"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    rows = measure(arguments.rounds)
    write_text(arguments.output, json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
