"""Tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from mpqdm_fx.quantized import QuantizationReport

__all__ = ["layer_table", "metrics_table", "summary_table"]


def layer_table(report: QuantizationReport) -> Table:
    """One row per quantized layer: shape, mean bits, bytes, SQNR, and why it is pinned."""
    table = Table(title="layers", header_style="bold")
    for heading in ("layer", "weight"):
        table.add_column(heading, overflow="fold")
    for heading in ("bits", "±", "bytes", "SQNR dB"):
        table.add_column(heading, justify="right")
    table.add_column("pinned")
    for layer in report.layers:
        table.add_row(
            layer.name,
            "x".join(str(size) for size in layer.shape),
            f"{layer.mean_bits:.2f}",
            f"{layer.fraction:.0%}" if layer.fraction else "",
            f"{layer.bytes:,}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            layer.reason or "",
        )
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Bits, bytes, SQNR and milliseconds per step of a quantized folder, against float."""
    table = Table(title="quantized against float", header_style="bold", show_header=True)
    table.add_column("")
    table.add_column("quantized", justify="right")
    table.add_column("float32", justify="right")
    weights = summary["weight_bytes"] + summary["float_remainder_bytes"]
    table.add_row("average bits of a weight (budgeted layers)", f"{summary['mean_bits']:.3f}", "32")
    table.add_row(
        "effective bits (all weights, all overhead)", f"{summary['effective_bits']:.3f}", "32"
    )
    table.add_row("parameter bytes", f"{weights:,}", f"{summary['float32_bytes']:,}")
    for name, size in summary.get("files", {}).items():
        if name.endswith((".pte", ".safetensors")):
            table.add_row(f"file {name}, bytes", f"{size:,}", "")
    table.add_row("noise SQNR, fake-quantized graph, dB", f"{summary['epsilon_sqnr_db']:.2f}", "")
    backend = summary["backend"]
    table.add_row(f"noise SQNR, {backend}, dB", f"{summary['backend_epsilon_sqnr_db']:.2f}", "")
    times = summary["milliseconds_per_step"]
    table.add_row(
        f"ms per step, batch 1 ({backend}; eager float, {summary['threads']} threads)",
        f"{times[backend]:.2f}",
        f"{times['float']:.2f}",
    )
    program = summary.get("program")
    if program:
        for key, value in program.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                shown = f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
                table.add_row(f"program: {key.replace('_', ' ')}", shown, "")
    return table


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """One row per metric."""
    table = Table(title="against the float model", header_style="bold")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
