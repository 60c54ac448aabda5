"""Tables of an exported pipeline, and of what an export will take: part by part."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from mpqdm_fx.report.evaluation_tables import shown
from mpqdm_fx.report.words import word_of

__all__ = ["export_estimate_table", "export_table", "layers_line", "pictures_line"]


def export_table(summary: Mapping[str, Any]) -> Table:
    """The parts of an exported folder: size, time and memory, as a program and in float."""
    table = _table("part", "form", "MiB", "was", "ms", "was", "peak", "was", "dB")
    table.caption = "was: in float; peak: MiB of loading and one call; dB: SQNR of the output"
    for name, part in summary["parts"].items():
        times = part["milliseconds"] or {}
        peaks = part["peak_memory_bytes"] or {}
        sqnr = part["quantized_sqnr_db"] if part["precision"] != "float" else None
        table.add_row(
            name,
            part["precision"],
            _mebibytes(part["bytes"]),
            _mebibytes(part["float32_bytes"]),
            _number(times.get("program")),
            _number(times.get("float")),
            _mebibytes(peaks.get("program")),
            _mebibytes(peaks.get("float")),
            _number(sqnr),
        )
    table.add_section()
    step = summary["milliseconds_per_step"] or {}
    table.add_row(
        "all, a step",
        "",
        _mebibytes(summary["bytes"]),
        _mebibytes(summary["float32_bytes"]),
        _number(step.get("program")),
        _number(step.get("float")),
    )
    return table


def pictures_line(summary: Mapping[str, Any]) -> str:
    """How far the programs' pictures are from those in float, in words; empty if none were drawn.

    Args:
        summary: Content of an exported folder's `summary.json`.
    """
    pictures = summary["pictures"]
    if pictures is None:
        return ""
    metrics = {
        "x0_sqnr": pictures["x0_sqnr_db"],
        "psnr": pictures["psnr_db"],
        "ssim": pictures["ssim"],
    }
    phrases = [
        f"{name} {shown(name, value)} ({word_of(name, value)})"
        for name, value in metrics.items()
        if value is not None
    ]
    noun = "sounds" if len(summary["size"]) == 1 else "pictures"
    return f"{pictures['count']} {noun} against float: {', '.join(phrases)}"


def layers_line(summary: Mapping[str, Any]) -> str:
    """How many layers were solved and taken, in words; empty of an export from nothing.

    Args:
        summary: Content of an exported folder's `summary.json`.
    """
    parts = summary["parts"].values()
    if not any("layers_taken" in part for part in parts):
        return ""
    solved, taken = (
        sum(part.get(key, 0) for part in parts) for key in ("layers_solved", "layers_taken")
    )
    return f"layers: {solved} solved, {taken} taken from the earlier export"


def export_estimate_table(expected: Mapping[str, Any]) -> Table:
    """What an export will take: time, memory, disk, and the size of every part."""
    table = _table("part", "parameters", "MiB", "was", "quantize", "lower", "measure")
    for name, part in expected["parts"].items():
        table.add_row(
            name,
            f"{part['parameters']:,}",
            _mebibytes(part["program_bytes"]),
            _mebibytes(part["float_bytes"]),
            *(_duration(part[f"{work}_seconds"]) for work in ("quantize", "lower", "measure")),
        )
    table.add_section()
    for label, value in (
        ("time in all", _duration(expected["seconds"])),
        ("  drawing samples", _duration(expected["draw_seconds"])),
        ("programs", f"{_mebibytes(expected['bytes'])} MiB"),
        ("peak memory", f"{_mebibytes(expected['peak_bytes'])} MiB"),
        ("disk while it runs", f"{_mebibytes(expected['disk_bytes'])} MiB"),
    ):
        table.add_row(label, value)
    if "free_bytes" in expected:
        table.add_row("free there", f"{_mebibytes(expected['free_bytes'])} MiB")
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _mebibytes(count: float | None) -> str:
    if count is None:
        return ""
    size = count / 2**20
    return f"{size:,.2f}" if size < 10 else f"{size:,.0f}"


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    number = float(value)
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
