"""Tables of numbers for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

__all__ = ["estimate_table", "metrics_table"]


def estimate_table(found: Mapping[str, float]) -> Table:
    """Time, memory and disk that a run is expected to take."""
    table = Table(title="expected", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("weight layers", f"{found['layers']:,}")
    table.add_row("weights", f"{found['weights']:,}")
    table.add_row("calibration calls", f"{found['calls']:,}")
    for name, label in (
        ("forward_seconds", "  both lanes forward"),
        ("solve_seconds", "  corrections and roundings"),
        ("sensitivity_seconds", "  sensitivities"),
        ("seconds", "time in all"),
    ):
        table.add_row(label, _duration(found[name]))
    for name, label in (
        ("activation_bytes", "  activations of all calls"),
        ("smallest_limit", "  smallest --max-memory that can do"),
        ("peak_bytes", "peak memory"),
        ("disk_bytes", "disk while it runs"),
    ):
        table.add_row(label, f"{found[name] / 2**20:,.0f} MiB")
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """One row per metric."""
    table = Table(title="against the float model", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
