"""Step time of a mid-size UNet on XNNPACK and own kernels, beside stock ExecuTorch and eager.

    pip install -e ".[bench]" ./native
    python benchmarks/phone.py --directory phone          # programs are kept there and used again

27 M parameters (128, 256, 256), attention at 16x16 and 8x8, 32x32 pixels, batch 1, random weights:
speed, sizes and delegates, no quality. All forms run in one process on the same threads,
interleaved; medians, quartiles, and ratios to the first form. Memory is that of a process of its
own: by how much loading and a step raise its peak, and its anonymous pages afterwards. `--peers`
adds OpenVINO and ONNX Runtime, `--instructions avx2` hides int8 dot products from XNNPACK and own
kernels. Numbers go to `<directory>/result.json`.
"""

import argparse
import importlib
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import phone_peers
import torch
from diffusers import UNet2DModel
from machine import anonymous_bytes, hide_dot_products
from phone_peers import PEERS, file_bytes, open_peer
from torch import Tensor

from mpqdm_fx import MPQConfig, QuantizedModel, load, quantize, save
from mpqdm_fx.backends.lowbit.layers import Kernels
from mpqdm_fx.backends.lowbit.lower import lower_lowbit
from mpqdm_fx.backends.xnnpack.edge import delegation, to_edge, to_program
from mpqdm_fx.backends.xnnpack.lower import lower_xnnpack, lower_xnnpack_float
from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner
from mpqdm_fx.capture.trace import trace
from mpqdm_fx.io.peak_memory import peak_rise
from mpqdm_fx.numerics.metrics import sqnr_db
from mpqdm_fx.sources.sources import load_source

Inputs = Mapping[str, Tensor]

_DIGITS = [1, 16, 16]
_SHAPE = [3, 32, 32]  # of a sample: says which network it is


def model() -> UNet2DModel:
    """The network, seeded; or `digits`."""
    if _SHAPE == _DIGITS:
        digits = load_source("digits").model
        assert isinstance(digits, UNet2DModel)
        return digits.eval()
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=64,
    ).eval()


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """One call, batch 1."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, *_SHAPE, generator=generator)
    call = {"sample": sample, "timestep": torch.tensor([100 + 97 * seed % 900])}
    return call | ({"class_labels": torch.tensor([seed % 10])} if _SHAPE == _DIGITS else {})


def stock_float(unet: UNet2DModel, path: Path) -> dict[str, Any]:
    """ExecuTorch as its documentation has it: export, partition, save."""
    return _stock(torch.export.export(_Plain(unet), tuple(inputs().values())), path)


def stock_int8(unet: UNet2DModel, path: Path) -> dict[str, Any]:
    """ExecuTorch's own quantizer, static int8."""
    return _stock(phone_peers.stock_int8(_Plain(unet), [inputs(seed) for seed in range(4)]), path)


def ours_float(unet: UNet2DModel, path: Path) -> dict[str, Any]:
    """This package, float."""
    return lower_xnnpack_float(trace(unet, inputs(), dynamic_batch=False), inputs(), path).to_dict()


def _quantized(unet: UNet2DModel, folder: Path, bits: int, mode: str) -> QuantizedModel:
    """`bits` a weight on average, static or dynamic int8 activations; kept beside the programs."""
    if folder.exists():
        return load(folder)
    settings = MPQConfig(
        weight_bits=bits,
        activation_mode=mode,  # type: ignore[arg-type]
        allocation="uniform" if bits == 8 else "measured",
        levels="uniform",
        rounding="nearest",
        propagation=0.0,
        slowdown=1,
        judge=False,
    )
    quantized: QuantizedModel = quantize(unet, settings, [inputs(seed) for seed in range(4)])
    save(quantized, folder)
    return quantized


def ours(
    bits: int, mode: str, kernels: Kernels | None = None
) -> Callable[[UNet2DModel, Path], dict[str, Any]]:
    """This package, on XNNPACK or, with `kernels`, on own kernels beside it."""

    def make(unet: UNet2DModel, path: Path) -> dict[str, Any]:
        quantized = _quantized(unet, path.with_name(f"W{bits}A8_{mode}"), bits, mode)
        effective = {"effective_bits": quantized.plan.effective_bits}
        graph, ranges = quantized.rounded, quantized.ranges
        if kernels is None:
            return {**lower_xnnpack(graph, ranges, inputs(), path).to_dict(), **effective}
        program = lower_lowbit(graph, ranges, inputs(), path, kernels=kernels)
        return {**program.to_dict(), **effective}

    return make


FORMS: Mapping[str, Callable[[UNet2DModel, Path], dict[str, Any]]] = {
    "stock fp32": stock_float,
    "stock int8": stock_int8,
    "ours fp32": ours_float,
    "ours W8A8 static": ours(8, "static"),
    "ours W8A8 dynamic": ours(8, "dynamic"),
    "ours W4A8 static": ours(4, "static"),
    **{f"ours W{bits}A8 dynamic": ours(bits, "dynamic") for bits in (4, 3, 2)},
    **{f"own kernels W{bits}A8": ours(bits, "dynamic", "memory") for bits in (8, 4, 3, 2)},
}


class _Plain(torch.nn.Module):
    """The network with a tuple for its output, which export wants."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *values: Tensor) -> Tensor:
        result: Tensor = self.unet(*values, return_dict=False)[0]
        return result


def _stock(exported: torch.export.ExportedProgram, path: Path) -> dict[str, Any]:
    edge = to_edge(exported)
    with path.open("wb") as file:
        to_program(edge).write_to_file(file)
    return {**delegation(edge), "bytes": path.stat().st_size}


def build(unet: UNet2DModel, directory: Path, form: str) -> dict[str, Any]:
    """Make a program, or take the one that is there."""
    path = directory / f"{form.replace(' ', '_')}.pte"
    facts = path.with_suffix(".json")
    if not facts.exists():
        start = time.perf_counter()
        program = FORMS[form](unet, path)
        program["seconds"] = time.perf_counter() - start
        facts.write_text(json.dumps(program, indent=1, default=str), encoding="utf-8")
    content: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return {**content, "path": str(path)}


def times(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Quartiles of the milliseconds of each form, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(rounds + 2):
        for name, run in forms.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.quantiles(values, n=4) for name, values in taken.items()}


def memory(path: str) -> tuple[float, float]:
    """Peak and anonymous mebibytes that a file and a step add to a fresh process."""
    network = ["--digits"] if _SHAPE == _DIGITS else []
    command = [sys.executable, __file__, *network, "--memory", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, anonymous = done.stdout.split()[-2:]
    return float(peak), float(anonymous)


def print_memory(path: Path) -> None:
    """The task of that process."""
    kept = []

    def step() -> None:
        if path.suffix == ".pte":
            runner = XnnpackRunner(path)
            kept.append((runner, runner(*inputs(9).values())))
        else:
            run = open_peer(path, inputs(9), threads=1)
            kept.append((run, run()))

    if path.suffix == ".pte":
        from executorch.extension.pybindings import portable_lib  # noqa: F401
    else:
        importlib.import_module({".onnx": "onnxruntime", ".xml": "openvino"}[path.suffix])
    before = anonymous_bytes()
    peak = peak_rise(step)
    print(peak / 2**20, (anonymous_bytes() - before) / 2**20)


def open_peers(
    unet: UNet2DModel, directory: Path, threads: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """What runs each peer, and what is known of it; a peer that fails has its error there."""
    runs: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}
    network, calls = _Plain(unet).eval(), [inputs(seed) for seed in range(4)]
    for name, make in PEERS.items():
        try:
            path = make(network, calls, directory)
            runs[name] = open_peer(path, inputs(9), threads)
            runs[name]()
            facts[name] = {"path": str(path), "bytes": file_bytes(path)}
        except Exception as error:  # whatever a peer raises is its row
            runs.pop(name, None)
            facts[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return runs, facts


def main() -> None:
    """Build what is missing, time everything, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("phone"))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--digits", action="store_true", help="the bundled network instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    parser.add_argument("--peers", action="store_true", help="OpenVINO and ONNX Runtime too")
    parser.add_argument("--instructions", choices=["avx2"], help="hide int8 dot products")
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.digits:
        _SHAPE[:] = _DIGITS
    if arguments.memory:
        print_memory(arguments.memory)
        return
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(arguments.threads)
    if arguments.instructions == "avx2":
        hide_dot_products()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    unet, call = model(), inputs(9)
    facts = {form: build(unet, arguments.directory, form) for form in arguments.forms}

    from executorch.extension.pybindings import portable_lib

    portable_lib._unsafe_reset_threadpool(arguments.threads)
    runners = {form: XnnpackRunner(facts[form]["path"]) for form in arguments.forms}
    runs: dict[str, Callable[[], Any]] = {
        form: (lambda runner=runner: runner(*call.values())[0]) for form, runner in runners.items()
    }
    if arguments.peers:
        peers, known = open_peers(unet, arguments.directory, arguments.threads)
        runs.update(peers)
        facts.update(known)
    with torch.no_grad():
        runs["eager fp32"] = lambda: unet(**call).sample
        if arguments.compiled:
            compiled = torch.compile(unet)
            runs["compiled fp32"] = lambda: compiled(**call).sample
        measured = times(runs, arguments.rounds)
        outputs = {form: run() for form, run in runs.items()}
    for row in facts.values():
        if "path" in row:
            row["peak_mib"], row["anonymous_mib"] = memory(row["path"])
    for form, output in outputs.items():
        if form != "eager fp32":
            row = facts.setdefault(form, {})
            row["sqnr_db"] = sqnr_db(outputs["eager fp32"], output)
    print_table(measured, facts)
    result = {"quartiles_ms": measured, "facts": facts, "threads": arguments.threads}
    (arguments.directory / "result.json").write_text(json.dumps(result, indent=1))


def print_table(
    measured: Mapping[str, Sequence[float]], facts: Mapping[str, Mapping[str, Any]]
) -> None:
    """A row a form; the errors of those that do not run."""
    first = next(iter(measured.values()))[1]
    columns = ("subgraphs", "crossings", "layout_copies", "undelegated", "bytes")
    numbers = ("peak_mib", "anonymous_mib", "sqnr_db")
    header = ("form", "ms", "quartiles", "ratio", *columns, *numbers)
    print(f"| {' | '.join(header)} |")
    print("|---" * len(header) + "|")
    for form, (low, median, high) in measured.items():
        row = facts.get(form, {})
        cells = [form, f"{median:.1f}", f"{low:.1f} {high:.1f}", f"{median / first:.2f}"]
        cells += [str(row.get(name, "")) for name in columns]
        cells += [f"{row[name]:.1f}" if name in row else "" for name in numbers]
        print(f"| {' | '.join(cells)} |")
    for form, row in facts.items():
        if "error" in row:
            print(f"{form}: {row['error']}")


if __name__ == "__main__":
    main()
