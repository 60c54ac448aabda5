"""A stranger's model at all widths: this package beside GPTQ and plain nearest rounding.

    pip install -e ".[bench]"
    python benchmarks/stranger.py --seeds 0 1 2 --pte programs --pictures pictures

The model is `terrain_model`'s. For each width, kind of activations, method and calibration seed:
output SQNR in dB over held-out inputs, together and at each sigma, and seconds; with `--pte` also
the program's SQNR, bytes and milliseconds, a float program beside it in interleaved rounds.
`nearest` is written here in plain PyTorch and uses nothing of this package: absmax scales per
output channel, and for activations the range of a sample (dynamic) or of all calibration calls
(static).

Each result is written as it is made, and is not made again while it is in the file. All of it takes
hours; `--widths`, `--modes`, `--methods` and `--calls` choose some of it. `--set refinements=0`
changes settings of this package's methods, under a name of their own (`default refinements=0`).
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from terrain_model import SIGMAS, Renoising, TerrainUNet, calls_along, load_terrain
from torch import Tensor, nn

from mpqdm_fx import MPQConfig, QuantizedModel, lower, quantize
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.calibration.sampling import denoise
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.io.files import write_text
from mpqdm_fx.io.sealed import read_json
from mpqdm_fx.report.images import save_grid
from mpqdm_fx.sources.denoisers import runner_denoiser

Call = Mapping[str, Tensor]
Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "stranger.json"
WIDTHS, MODES = (8, 4, 3, 2), ("float", "dynamic", "static")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "nearest": {},
    "gptq": {
        "allocation": "uniform", "refinements": 0, "propagation": 0.0, "bias_correction": False,
        "row_weights": "plain", "judge": False, "slowdown": 1,
    },
    "default": {},
}  # fmt: skip
_HELD_OUT_SEED, _ROUNDS = 99, 11


def nearest(network: nn.Module, bits: int, mode: str, calls: Sequence[Call]) -> nn.Module:
    """Nearest rounding with absmax scales: the reference, in plain PyTorch.

    Args:
        network: The float model; it is copied.
        bits: Of every weight of every convolution and linear layer.
        mode: Of their inputs, 8 bits: `"float"`, `"dynamic"` (a range for each sample), `"static"`.
        calls: What static ranges are those of.
    """
    rounded = copy.deepcopy(network)
    layers = [m for m in rounded.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ends: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def observe(layer: nn.Module, args: tuple[Tensor]) -> None:
        low, high = ends.get(layer, (torch.zeros(()), torch.zeros(())))
        ends[layer] = torch.minimum(low, args[0].min()), torch.maximum(high, args[0].max())

    def quantize_input(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        low, high = ends.get(layer) or (x.flatten(1).amin(1), x.flatten(1).amax(1))
        low, high = (
            e.reshape(-1, *[1] * (x.ndim - 1)) for e in (low.clamp_max(0), high.clamp_min(0))
        )
        scale = ((high - low) / 255).clamp_min(1e-12)
        zero = (-low / scale).round()
        return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale

    if mode == "static":
        hooks = [layer.register_forward_pre_hook(observe) for layer in layers]
        with torch.no_grad():
            for call in calls:
                rounded(**call)
        for hook in hooks:
            hook.remove()
    for layer in layers:
        weight, largest = layer.weight.data, 2 ** (bits - 1) - 1
        scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / largest
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
        layer.weight.data = (weight / scale).round().clamp(-largest, largest) * scale
        if mode != "float":
            layer.register_forward_pre_hook(quantize_input)
    return rounded


def decibels(reference: Tensor, outputs: Tensor) -> float:
    """Output SQNR."""
    error = (reference - outputs).square().sum()
    return round(float(10 * torch.log10(reference.square().sum() / error)), 3)


@torch.no_grad()
def measured(model: Callable[..., Any], calls: Sequence[Call], floats: Sequence[Tensor]) -> Row:
    """Output SQNR over all calls, and at each sigma."""
    outputs = [model(**call) for call in calls]
    outputs = [output if isinstance(output, Tensor) else output[0] for output in outputs]
    at: dict[str, float] = {}
    for sigma in SIGMAS:
        rows = [
            i for i, call in enumerate(calls) if abs(float(call["sigma"][0]) / sigma - 1) < 1e-5
        ]
        pairs = ([part[i] for i in rows] for part in (floats, outputs))
        at[f"{sigma:g}"] = decibels(*map(torch.cat, pairs))
    return {"sqnr_db": decibels(torch.cat([*floats]), torch.cat(outputs)), "sqnr_db_at": at}


class Bench:
    """What all results share: the float model, its held-out inputs and outputs, its program."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.network: TerrainUNet = load_terrain(arguments.onnx)
        self.count = arguments.calls
        self.settings = dict(_setting(text) for text in arguments.set)
        self.pte, self.pictures = arguments.pte, arguments.pictures
        self.held_out = calls_along(self.network, arguments.held_out, _HELD_OUT_SEED)
        with torch.no_grad():
            self.floats = [self.network(**call) for call in self.held_out]

    def result(self, bits: int, mode: str, method: str, seed: int, name: str) -> Row:
        """One row of the table."""
        calls, file = calls_along(self.network, self.count, seed), name.replace(" ", "_")
        start = time.perf_counter()
        if method == "nearest":
            model = nearest(self.network, bits, mode, calls)
        else:
            settings = {**METHODS[method], **self.settings, "weight_bits": bits, "seed": seed}
            model = quantize(self.network, MPQConfig(activation_mode=mode, **settings), calls)
        row: Row = {"seconds": round(time.perf_counter() - start, 1)}
        row.update(measured(model, self.held_out, self.floats))
        runs: Callable[..., Any] = model
        if isinstance(model, QuantizedModel):
            row["effective_bits"] = round(model.plan.effective_bits, 4)
            if self.pte is not None and mode != "float":
                numbers, runs = self._program(model, self.pte / f"{file}.pte")
                row["program"] = numbers
        if self.pictures is not None:
            self._picture(runs, self.pictures / f"{file}.png")
        return row

    def _program(self, model: QuantizedModel, path: Path) -> tuple[Row, Callable[..., Any]]:
        """Lower, measure, and time beside the float program."""
        path.parent.mkdir(parents=True, exist_ok=True)
        program = lower(model, "xnnpack", output=path)
        runner = XnnpackRunner(path)
        run = runner_denoiser(runner, model.signature)
        numbers = measured(run, self.held_out, self.floats)
        runners = {"program": runner, "float": XnnpackRunner(self._float_program(path.parent))}
        single = [value[:1] for value in self.held_out[0].values()]
        times: dict[str, list[float]] = {form: [] for form in runners}
        for index in range(_ROUNDS + 1):
            for form, program_runner in runners.items():
                start = time.perf_counter()
                program_runner(*single)
                if index:  # the first round warms up
                    times[form].append(1e3 * (time.perf_counter() - start))
        ratios = [a / b for a, b in zip(times["program"], times["float"], strict=True)]
        numbers |= {"bytes": program.bytes, "subgraphs": program.subgraphs}
        numbers["milliseconds"] = {
            form: round(statistics.median(v), 2) for form, v in times.items()
        }
        numbers["time_ratio"] = round(statistics.median(ratios), 3)
        return numbers, run

    def _float_program(self, folder: Path) -> Path:
        path = folder / "float.pte"
        if not path.exists():
            single = {name: value[:1] for name, value in self.held_out[0].items()}
            graph = trace(self.network, single, dynamic_batch=False)
            lower_xnnpack_float(graph, single, path)
        return path

    def _picture(self, model: Callable[..., Any], path: Path) -> None:
        """Terrains of the same noise: float above, quantized below."""
        noise = torch.randn(4, 1, 128, 128, generator=torch.Generator().manual_seed(7))
        options: dict[str, Any] = {
            "seed": 7, "conditions": {"difficulty": torch.linspace(0.2, 0.95, 4)},
        }  # fmt: skip
        rows = [denoise(model, Renoising(), noise, **options) for model in (self.network, model)]
        # relief and not height: each terrain over its own range
        heights = rows[0].flatten(1)
        low, high = (end.reshape(-1, 1, 1, 1) for end in (heights.amin(1), heights.amax(1)))
        save_grid(torch.cat([2 * (row - low) / (high - low) - 1 for row in rows]), path, 4, zoom=2)


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def row_settings(arguments: argparse.Namespace) -> Iterator[tuple[int, str, str, int, str]]:
    """Width, mode, method, seed and name of every row that was asked for."""
    changed = "".join(f" {text}" for text in arguments.set)
    for seed in arguments.seeds:
        for bits in arguments.widths:
            for mode in arguments.modes:
                if mode == "float" and bits != max(WIDTHS):
                    continue
                for method in arguments.methods:
                    suffix = "" if method == "nearest" else changed
                    runs = f"{arguments.calls}x{len(SIGMAS)} seed{seed}"
                    name = f"W{bits} {mode} {method}{suffix} {runs}"
                    yield bits, mode, method, seed, name


def table(rows: Mapping[str, Row]) -> str:
    """All results as Markdown, means ± (largest - smallest) over seeds; widest bits first."""
    groups: dict[str, list[Row]] = {}
    for name, row in rows.items():
        groups.setdefault(name.rpartition(" seed")[0], []).append(row)
    lines = ["| what | all | by sigma | seeds | program | time | bytes |", "|---" * 7 + "|"]
    for name in sorted(groups, key=_place):
        bits, mode, method, *_ = name.split()
        group = groups[name]
        label = f"{bits}, {method}" if mode == "float" else f"{bits}A8 {mode}, {method}"
        levels = " ".join(
            f"{statistics.mean(row['sqnr_db_at'][f'{sigma:g}'] for row in group):.1f}"
            for sigma in SIGMAS
        )
        ratios = [row["sqnr_db"] for row in group]
        spread = f" ± {max(ratios) - min(ratios):.1f}" if len(group) > 1 else ""
        cells = [label, f"{statistics.mean(ratios):.1f}{spread}", levels, str(len(group))]
        lines.append(f"| {' | '.join([*cells, *_program(group)])} |")
    return "\n".join(lines)


def _place(name: str) -> tuple[int, int, int]:
    """Where a row stands: wide bits first, then float activations, then the simplest method."""
    bits, mode, method, *_ = name.split()
    return -int(bits[1:]), MODES.index(mode), [*METHODS].index(method)


def _program(group: Sequence[Row]) -> tuple[str, str, str]:
    """Quality, time against float, and bytes of the programs of some rows; empty without any."""
    programs = [row["program"] for row in group if "program" in row]
    if not programs:
        return "", "", ""
    quality, ratio, size = (
        statistics.mean(program[key] for program in programs)
        for key in ("sqnr_db", "time_ratio", "bytes")
    )
    return f"{quality:.1f}", f"{ratio:.2f}", f"{size:,.0f}"


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--onnx", type=Path, help="the package's file; else it is downloaded")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, choices=WIDTHS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument(
        "--calls", type=int, default=3, help="batches of two terrains at all sigmas"
    )
    parser.add_argument("--held-out", type=int, default=2, help="the same, to measure on")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--pte", type=Path, help="folder for programs; without it none are made")
    parser.add_argument("--pictures", type=Path, help="folder for pictures of heights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows: dict[str, Row] = read_json(arguments.output) if arguments.output.exists() else {}
    bench = None
    for bits, mode, method, seed, name in row_settings(arguments):
        programmed = arguments.pte is not None and mode != "float" and method != "nearest"
        if name in rows and not (programmed and "program" not in rows[name]):
            continue
        bench = bench or Bench(arguments)
        rows[name] = bench.result(bits, mode, method, seed, name)
        print(json.dumps({name: rows[name]}), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.output, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
