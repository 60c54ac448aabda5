"""The end of a run: a dozen lines by which to judge the result, and all numbers as a table."""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult

from mpqdm_fx.cli.screens.columns import Column, Columns, unbroken
from mpqdm_fx.cli.screens.layers import ORDERS
from mpqdm_fx.records.report import QuantizationReport
from mpqdm_fx.report.units import amount, duration
from mpqdm_fx.report.words import word_of_sqnr

__all__ = ["ResultScreen", "summary_table"]

_REPORT = "report.html"
_PROGRAMS = (".pte", ".ptd")
_WORST = 5
_LABEL = 14  # columns
_WIDEST = 100  # a line is read more easily than that


class ResultScreen:
    """The last lines of a run, for rich.

    Args:
        summary: Content of `summary.json`.
        report: Where its layers are told; None to leave them out.
        folder: The result.
    """

    def __init__(
        self, summary: Mapping[str, Any], report: QuantizationReport | None, folder: Path
    ) -> None:
        self.summary, self.report, self.folder = summary, report, folder

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield its lines."""
        width = min(options.max_width, _WIDEST)
        for label, value in self._lines(width):
            line = unbroken(f"{label:<{_LABEL}}{value}", options)
            line.stylize("bold", 0, _LABEL)
            yield line

    def _lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Labels and values, each a line."""
        for label, value in _facts(self.summary):
            for index, line in enumerate(textwrap.wrap(value, width - _LABEL)):
                yield "" if index else label, line
        layers = [] if self.report is None else list(self.report.layers)
        worst = sorted((entry for entry in layers if entry.sqnr_db is not None), key=ORDERS["sqnr"])
        names = Columns("", [Column(heading="", kind="name"), *(Column(heading="") for _ in "12")])
        for layer in worst[:_WORST]:
            names.add(layer.name, f"{layer.mean_bits:.2f} bits", f"{layer.sqnr_db:.1f} dB")
        for index, line in enumerate(names.rows(width - _LABEL)):
            yield "" if index else "worst layers", line
        if (self.folder / _REPORT).is_file():
            yield "report", str(self.folder / _REPORT)


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    backend, program = summary["backend"], summary["program"]
    weights, before = _sizes(summary)
    size = f"weights {amount(weights)}, were {amount(before)} ({weights / before:.1%})"
    stored = {
        name: size
        for name, size in summary["files"].items()
        if name.removesuffix(".xz").endswith(_PROGRAMS)
    }
    if stored:
        size += f"; {' + '.join(stored)} {amount(sum(stored.values()))}"
    yield "size", size
    times, threads = summary["milliseconds_per_step"], summary["threads"]
    count = "1 thread" if threads == 1 else f"{threads} threads"
    now, was_then = (_milliseconds(times[form]) for form in (backend, "float"))
    of = " fake-quantized" if backend == "packed" else ""  # which no phone runs
    yield "time", f"{now} ms a step{of}, was {was_then} (batch 1, {count})"
    peaks = dict(summary["peak_memory_bytes"])
    was = peaks.pop("float")
    for peak in peaks.values():
        if peak is not None:
            earlier = "" if was is None else f", was {amount(was)}"
            yield "peak memory", f"{amount(peak)} to load and run a step{earlier}"
    decibels = summary["backend_epsilon_sqnr_db"]
    word = word_of_sqnr(decibels)
    yield "noise SQNR", f"{decibels:.1f} dB, {word}: output of one call against float"
    if trained := summary.get("distilled"):
        yield "training", _training(trained)
    yield "whole program", _whole(program, backend)
    if backend == "lowbit" and program is not None:
        yield "own kernels", _own(program)
    for remark in summary["remarks"]:
        yield "note", remark


def _milliseconds(time: float) -> str:
    return f"{time:.1f}" if time >= 10 else f"{time:.2f}"


def _sizes(summary: Mapping[str, Any]) -> tuple[int, int]:
    return summary["weight_bytes"] + summary["float_remainder_bytes"], summary["float32_bytes"]


def _training(trained: Mapping[str, Any]) -> str:
    took = f"{trained['updates']:,} updates in {duration(trained['seconds'])}"
    if not trained["improved"]:
        return f"{took} did not help: the model is as before"
    return f"{took}; noise SQNR was {trained['epsilon_sqnr_db_before']:.1f} dB"


def _whole(program: Mapping[str, Any] | None, backend: str) -> str:
    if program is None:
        return f"none: {backend} has no program"
    delegates = program["subgraphs"]
    whole = "yes, 1 delegate" if delegates == 1 else f"no, {delegates} delegates"
    if not program["undelegated"]:
        return f"{whole} with all {program['delegated']:,} nodes"
    names = [name.removeprefix("aten_").removesuffix("_default") for name in program["refusals"]]
    rest = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{whole} with {program['delegated']:,} nodes; outside {program['undelegated']}: {rest}"


def _own(program: Mapping[str, Any]) -> str:
    own, left = len(program["own_layers"]), len(program["left_layers"])
    copied = amount(program["layout_copy_bytes"])
    return (
        f"{own} layers, {left} left to XNNPACK; {program['crossings']} crossings, "
        f"{program['layout_copies']} layout copies of {copied}"
    )


def summary_table(summary: Mapping[str, Any]) -> Columns:
    """Bits, bytes, SQNR and milliseconds per step of a quantized folder, against float."""
    table = Columns(
        "quantized against float",
        [
            Column(heading="", kind="name"),
            Column(heading="quantized"),
            Column(heading="float32"),
        ],
        note="\n".join(summary["remarks"]),
    )
    weights, before = _sizes(summary)
    backend, peaks = summary["backend"], summary["peak_memory_bytes"]
    table.add("bits of a weight, budgeted layers", f"{summary['mean_bits']:.3f}", "32")
    table.add("effective bits, all weights and overhead", f"{summary['effective_bits']:.3f}", "32")
    table.add("parameters, bytes", f"{weights:,}", f"{before:,}")
    for name, size in summary["files"].items():
        if name.endswith((".pte", ".ptd", ".xz", ".safetensors")):
            table.add(f"{name}, bytes", f"{size:,}", "")
    table.add("noise SQNR, fake-quantized graph, dB", f"{summary['epsilon_sqnr_db']:.2f}", "")
    if trained := summary.get("distilled"):
        table.add("  before training, dB", f"{trained['epsilon_sqnr_db_before']:.2f}", "")
        table.add("  updates of training", f"{trained['updates']:,}", "")
        table.add("  time of training", duration(trained["seconds"]), "")
    table.add(f"noise SQNR, {backend}, dB", f"{summary['backend_epsilon_sqnr_db']:.2f}", "")
    times = summary["milliseconds_per_step"]
    label = f"ms a step, batch 1, threads: {summary['threads']}"
    table.add(label, f"{times[backend]:.2f}", f"{times['float']:.2f}")
    for form, size in peaks.items():
        if form != "float" and size is not None:
            other = peaks["float"]  # None where the system tells no peak
            was = "" if other is None else f"{other / 2**20:.1f}"
            table.add("peak memory, load and a step, MiB", f"{size / 2**20:.1f}", was)
    if program := summary["program"]:
        table.add("program: XNNPACK subgraphs", str(program["subgraphs"]), "")
        table.add("program: nodes delegated", f"{program['delegated']:,}", "")
        table.add("program: nodes on portable kernels", f"{program['undelegated']:,}", "")
        if backend == "lowbit":
            table.add("program: layers in own kernels", str(len(program["own_layers"])), "")
            table.add("program: layers left to XNNPACK", str(len(program["left_layers"])), "")
            table.add("program: crossings between the two", str(program["crossings"]), "")
            table.add("program: layout copies", str(program["layout_copies"]), "")
            table.add("program: layout copies, bytes", f"{program['layout_copy_bytes']:,}", "")
        if program["four_bit_layers"]:
            layers = f"{len(program['four_bit_layers'])}"
            table.add("program: layers stored at four bits", layers, "")
        table.add("program against converted graph, dB", f"{program['sqnr_db']:.1f}", "")
        if program["max_lsb"] is not None:
            table.add("program against converted graph, LSB", f"{program['max_lsb']:.0f}", "")
        table.add("program: seconds to lower", f"{program['seconds']:.0f}", "")
    return table
