"""What others make of a UNet of Stable Diffusion 1.5's size, beside the forms of `large_phone.py`.

    pip install openvino nncf onnxruntime onnx onnxscript
    python benchmarks/large_peers.py --directory large_peers
    python benchmarks/large_peers.py --directory try --narrower 4      # a quick try

Stock ExecuTorch, ONNX Runtime, OpenVINO, eager and compiled torch. A peer is made in one process
and run in another, so that every peak is its own; one that fails has its error in its row. What is
in the directory is not made again. Numbers go to `<directory>/<peer>.make.json` and `.run.json`.
"""

import argparse
import importlib
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import phone_peers
import torch
from large_model import calls, model, peak_gib
from machine import anonymous_bytes
from torch import Tensor, nn

from mpqdm_fx.numerics.metrics import sqnr_db

Run = Callable[[], Tensor]
Make = Callable[[nn.Module, list[dict[str, Any]], Path], Path]


class Plain(nn.Module):
    """The network with a tensor for its output, which exporters want."""

    def __init__(self, narrower: int) -> None:
        super().__init__()
        self.unet = model(narrower)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Noise, in the shape of the sample."""
        result: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return result


def _stock(name: str, quantized: bool) -> Make:
    """ExecuTorch as its documentation has it: export, quantizer, partition, save."""

    def make(network: nn.Module, data: list[dict[str, Any]], directory: Path) -> Path:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        path = directory / f"{name}.pte"
        if quantized:
            exported = phone_peers.stock_int8(network, data)
        else:
            exported = torch.export.export(network, tuple(data[0].values()))
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        with path.open("wb") as file:
            edge.to_executorch().write_to_file(file)
        return path

    return make


#: What makes a peer's file; those of torch need none.
FILES: Mapping[str, Make] = {
    "stock fp32": _stock("stock_fp32", quantized=False),
    "stock int8": _stock("stock_int8", quantized=True),
    **phone_peers.PEERS,
}
PEERS = [*FILES, "eager fp32", "compiled fp32"]


def make_peer(peer: str, directory: Path, narrower: int) -> dict[str, Any]:
    """Make a peer's file; this process's peak is that of making it."""
    start = time.perf_counter()
    data = calls()
    with torch.no_grad():
        path = FILES[peer](Plain(narrower).eval(), data[::2], directory)
    return {
        "path": str(path),
        "bytes": phone_peers.file_bytes(path),
        "making_seconds": time.perf_counter() - start,
        "making_peak_gib": peak_gib(),
    }


def open_peer(peer: str, path: Path | None, narrower: int, threads: int) -> Run:
    """Load a peer; the result runs a step on the last call."""
    call = calls()[-1]
    if path is None:
        network: Callable[..., Tensor] = Plain(narrower).eval()
        if peer == "compiled fp32":
            network = torch.compile(network)
        return lambda: network(**call)
    if path.suffix == ".pte":
        from executorch.extension.pybindings import portable_lib

        from mpqdm_fx.backends.xnnpack.runner import XnnpackRunner

        portable_lib._unsafe_reset_threadpool(threads)
        runner = XnnpackRunner(path)
        return lambda: runner(*call.values())[0]
    return phone_peers.open_peer(path, call, threads)


def run_peer(peer: str, path: Path | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run steps; this process's peak is that of loading and running."""
    if path is not None:
        libraries = {".pte": "executorch", ".onnx": "onnxruntime", ".xml": "openvino"}
        importlib.import_module(libraries[path.suffix])
    idle, before = peak_gib(), anonymous_bytes()
    start = time.perf_counter()
    taken = []
    with torch.no_grad():
        step = open_peer(peer, path, arguments.narrower, arguments.threads)
        loaded = time.perf_counter() - start
        for _ in range(arguments.steps + 1):
            start = time.perf_counter()
            output = step()
            taken.append(time.perf_counter() - start)
        facts = {
            "load_seconds": loaded,
            "first_step_seconds": taken[0],
            "step_seconds": statistics.median(taken[1:]),
            "running_peak_gib": peak_gib() - idle,
            "running_anonymous_gib": (anonymous_bytes() - before) / 2**30,
            "threads": arguments.threads,
        }
        # behind the measurement: the float network would count
        facts["sqnr_db"] = sqnr_db(Plain(arguments.narrower).eval()(**calls()[-1]), output)
    return facts


def in_process(options: list[str], file: Path) -> dict[str, Any]:
    """What a task in a process of its own found, kept in a file; its error if it failed."""
    if not file.exists():
        options = [*options, "--result", str(file)]
        done = subprocess.run([sys.executable, *sys.argv, *options], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            error = lines[-1][:300] if lines else f"exit status {done.returncode}"
            if done.returncode < 0:
                error = f"killed by signal {-done.returncode}"
            file.write_text(json.dumps({"error": error}), encoding="utf-8")
    facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return facts


def main() -> None:
    """Make and run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--narrower", type=int, default=1, help="divide all widths, to try it out")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--make-only", action="store_true", help="time nothing yet")
    parser.add_argument("--make", choices=list(FILES), help=argparse.SUPPRESS)
    parser.add_argument("--run", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(arguments.threads)
    if arguments.make or arguments.run:
        if arguments.make:
            facts = make_peer(arguments.make, arguments.directory, arguments.narrower)
        else:
            facts = run_peer(arguments.run, arguments.file, arguments)
        arguments.result.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        return
    arguments.directory.mkdir(parents=True, exist_ok=True)
    for peer in arguments.peers:
        stem = arguments.directory / peer.replace(" ", "_")
        facts = {}
        if peer in FILES:
            facts = in_process(["--make", peer], stem.with_suffix(".make.json"))
        if "error" not in facts and not arguments.make_only:
            file = ["--file", facts["path"]] if peer in FILES else []
            facts |= in_process(["--run", peer, *file], stem.with_suffix(".run.json"))
        print_row(peer, facts)


def print_row(peer: str, facts: Mapping[str, Any]) -> None:
    """A row of the table; the error of a peer that does not run."""
    columns = {
        "bytes": "", "step_seconds": ".2f", "running_peak_gib": ".2f",
        "running_anonymous_gib": ".2f", "making_seconds": ".0f", "making_peak_gib": ".1f",
        "sqnr_db": ".1f",
    }  # fmt: skip
    cells = [format(facts[name], form) if name in facts else "" for name, form in columns.items()]
    print(f"| {peer} | {' | '.join(cells)} | {facts.get('error', '')} |", flush=True)


if __name__ == "__main__":
    main()
