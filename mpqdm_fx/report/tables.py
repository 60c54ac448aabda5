"""Tables for the terminal."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mpqdm_fx.quantized import LayerReport, QuantizationReport

__all__ = [
    "activation_table",
    "estimate_table",
    "judgement_table",
    "layer_table",
    "summary_table",
]

_SHOWN = 12  # inputs whose rounding costs most


def layer_table(report: QuantizationReport) -> Table:
    """One row per quantized layer: shape, mean bits, bytes, SQNR, and why it is pinned.

    `gain` is what error propagation brought on held-out rows, in dB, at the strength `alpha`.
    """
    table = Table(title="layers", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("layer", "weight"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits", "mixed", "bytes", "SQNR dB", "gain", "alpha"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("pinned")
    for layer in report.layers:
        table.add_row(
            layer.name,
            "x".join(str(size) for size in layer.shape),
            f"{layer.mean_bits:.2f}",
            _mixed(layer),
            f"{layer.bytes:,}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            _gain(layer),
            f"{layer.alpha:.2f}" if layer.alpha else "",
            Text(layer.reason or ""),  # may name a pattern with brackets, which are no markup
        )
    return table


def activation_table(report: QuantizationReport) -> Table:
    """One row per input, the dearest first: what its rounding alone does, and what was chosen.

    `as it is` is the noise of the model's output from rounding this input to 8 bits as it is, in dB
    below the output, `chosen` the same with what was chosen; inputs that cost least share a row.
    """
    table = Table(title="inputs of layers", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("input of", no_wrap=True)
    for heading in ("as it is dB", "chosen dB", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what was chosen")
    ordered = sorted(report.activations, key=lambda one: -one.quantized_cost)
    for one in ordered[:_SHOWN]:
        first, *others = one.layers
        table.add_row(
            first + (f" and {len(others)} more" if others else ""),
            _noise(one.quantized_cost),
            _noise(one.cost),
            f"{one.slowdown:+.1%}" if one.slowdown >= 5e-4 else "",
            one.told,
        )
    rest = ordered[_SHOWN:]
    if rest:
        counts = Counter(one.told for one in rest)
        table.add_row(
            f"{len(rest)} others",
            _noise(sum(one.quantized_cost for one in rest)),
            _noise(sum(one.cost for one in rest)),
            f"{sum(one.slowdown for one in rest):+.1%}",
            ", ".join(f"{count} {told}" for told, count in counts.most_common()),
        )
    return table


def _noise(share: float) -> str:
    return f"{-10 * math.log10(share):.1f}" if share > 0 else ""


def judgement_table(report: QuantizationReport) -> Table:
    """The recipe and plain rounding at the model's output, on held-out calls, by noise level."""
    table = Table(title="held-out calls, output SQNR dB", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("all", justify="right")
    groups = max((len(one.sqnr_db) for one in report.judged), default=0)
    for index in range(groups if groups > 1 else 0):
        table.add_column(f"level {index + 1}", justify="right")
    for one in report.judged:
        levels = ["" if db is None else f"{db:.1f}" for db in one.sqnr_db]
        name = one.recipe + (" (taken)" if one.chosen else "")
        table.add_row(name, f"{one.decibels:.1f}", *(levels if groups > 1 else ()))
    fitted = [layer for layer in report.layers if layer.rows]
    propagated = sum(1 for layer in fitted if layer.alpha or layer.beta)
    refitted = sum(1 for layer in fitted if layer.refitted)
    if fitted:
        table.caption = (
            f"kept where held-out calls agree: errors propagated into {propagated}, "
            f"biases refitted in {refitted} of {len(fitted)} layers"
        )
    return table


def _mixed(layer: LayerReport) -> str:
    if layer.fraction:
        return f"±{layer.fraction:.0%}"
    return "" if layer.mean_bits == int(layer.mean_bits) else "mixed"


def _gain(layer: LayerReport) -> str:
    if layer.sqnr_db is None or layer.base_sqnr_db is None:
        return ""
    gain = layer.sqnr_db - layer.base_sqnr_db
    return f"{gain:+.1f}" if math.isfinite(gain) and abs(gain) >= 0.05 else ""


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Bits, bytes, SQNR and milliseconds per step of a quantized folder, against float."""
    table = Table(title="quantized against float", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("quantized", justify="right")
    table.add_column("float32", justify="right")
    table.caption = Text("\n".join(summary.get("remarks", ())), justify="left")
    weights = summary["weight_bytes"] + summary["float_remainder_bytes"]
    table.add_row("average bits of a weight (budgeted layers)", f"{summary['mean_bits']:.3f}", "32")
    table.add_row(
        "effective bits (all weights, all overhead)", f"{summary['effective_bits']:.3f}", "32"
    )
    table.add_row("parameter bytes", f"{weights:,}", f"{summary['float32_bytes']:,}")
    for name, size in summary.get("files", {}).items():
        if name.endswith((".pte", ".ptd", ".xz", ".safetensors")):
            table.add_row(f"file {name}, bytes", f"{size:,}", "")
    table.add_row("noise SQNR, fake-quantized graph, dB", f"{summary['epsilon_sqnr_db']:.2f}", "")
    if trained := summary.get("distilled"):
        before = f"{trained['epsilon_sqnr_db_before']:.2f}"
        table.add_row("  before training, dB", before, "")
        took = f"{trained['updates']} / {_duration(trained['seconds'])}"
        table.add_row("  updates / time of training", took, "")
        if not trained["improved"]:
            table.add_row("  training did not help: the model is as before", "", "")
    backend = summary["backend"]
    table.add_row(f"noise SQNR, {backend}, dB", f"{summary['backend_epsilon_sqnr_db']:.2f}", "")
    label = f"ms per step, batch 1, {summary['threads']} threads ({backend}; eager float)"
    times = summary["milliseconds_per_step"]
    table.add_row(label, f"{times[backend]:.2f}", f"{times['float']:.2f}")
    for form, size in summary.get("peak_memory_bytes", {}).items():
        if form != "float" and size is not None:
            other = summary["peak_memory_bytes"]["float"]  # None where the system tells no peak
            shown = f"{size / 2**20:.1f}", "" if other is None else f"{other / 2**20:.1f}"
            table.add_row(f"peak memory of load and one step, MiB ({form}; eager float)", *shown)
    program = summary.get("program")
    if program:
        nodes = f"{program['delegated']} / {program['undelegated']}"
        table.add_row("program: XNNPACK subgraphs", str(program["subgraphs"]), "")
        table.add_row("program: nodes delegated / on portable kernels", nodes, "")
        if program.get("four_bit_layers"):
            layers = f"{len(program['four_bit_layers'])}"
            table.add_row("program: layers stored at four bits", layers, "")
        difference = f"{program['sqnr_db']:.1f}"
        if program["max_lsb"] is not None:
            difference += f" ({program['max_lsb']:.0f} LSB)"
        table.add_row("program against the converted graph, dB", difference, "")
        table.add_row("program: seconds to lower", f"{program['seconds']:.0f}", "")
    return table


def estimate_table(found: Mapping[str, Any]) -> Table:
    """Time, memory and disk that a run is expected to take, and the size of its result."""
    table = Table(title="expected", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("weight layers", f"{found['layers']:,}")
    table.add_row("weights", f"{found['weights']:,}")
    table.add_row("calibration calls", f"{found['calls']:,}")
    for stage, seconds in found["stages"].items():
        table.add_row(f"  {stage}", _duration(seconds))
    table.add_row("time in all", _duration(found["seconds"]))
    for name, label in (
        ("activation_bytes", "  activations of all calls"),
        ("smallest_limit", "  smallest --max-memory that can do"),
        ("peak_bytes", "peak memory"),
        ("disk_bytes", "disk while it runs"),
        ("weight_bytes", "result: packed weights"),
        ("program_bytes", "result: program"),
    ):
        if found[name]:
            table.add_row(label, f"{found[name] / 2**20:,.1f} MiB")
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
