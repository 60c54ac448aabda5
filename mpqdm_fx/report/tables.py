"""Tables of numbers for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from mpqdm_fx.report.units import duration

__all__ = ["estimate_table"]


def estimate_table(estimate: Mapping[str, Any]) -> Table:
    """Time, memory and disk that a run is expected to take, and the size of its result."""
    table = Table(title="expected", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("weight layers", f"{estimate['layers']:,}")
    table.add_row("weights", f"{estimate['weights']:,}")
    table.add_row("calibration calls", f"{estimate['calls']:,}")
    for stage, seconds in estimate["stages"].items():
        table.add_row(f"  {stage}", duration(seconds))
    table.add_row("time in all", duration(estimate["seconds"]))
    for name, label in (
        ("activation_bytes", "  activations of all calls"),
        ("smallest_limit", "  smallest --max-memory that can do"),
        ("peak_bytes", "peak memory"),
        ("disk_bytes", "disk while it runs"),
        ("weight_bytes", "result: packed weights"),
        ("program_bytes", "result: program"),
        ("free_bytes", "free on the disk of --output"),
    ):
        if estimate.get(name):
            table.add_row(label, f"{estimate[name] / 2**20:,.1f} MiB")
    return table
