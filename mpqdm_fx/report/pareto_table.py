"""The table of several budgets of one model, within 80 columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mpqdm_fx.report.evaluation_tables import shown
from mpqdm_fx.report.words import word_of_sqnr

__all__ = ["pareto_table"]


def pareto_table(points: Sequence[Mapping[str, Any]], picked: float | None) -> Table:
    """One row a budget: size, quality, time.

    Args:
        points: As in `pareto.json`.
        picked: Bits of the point that was picked, or None.
    """
    table = Table(title="budgets", header_style="bold", box=box.SIMPLE_HEAD)
    columns = [n for n in ("x0_sqnr", "frechet_distance") if n in points[0]["metrics"]]
    heads = {"x0_sqnr": "x0", "frechet_distance": "FD"}
    for heading in ("bits", "stored", "size", "noise SQNR"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(heads[name], justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    for point in points:
        metrics = point["metrics"]
        table.add_row(
            f"{'*' if point['bits'] == picked else ''}{point['bits']:g}",
            f"{metrics['effective_bits']:.2f}",
            f"{metrics['parameter_bytes'] / 1e3:,.0f} kB",
            shown("epsilon_sqnr", metrics["epsilon_sqnr"]),
            word_of_sqnr(metrics["epsilon_sqnr"]),
            *(shown(name, metrics[name]) for name in columns),
            f"{metrics['seconds']:.0f} s",
        )
    if picked is not None:
        table.caption = Text("* picked: the smallest that keeps the gates", justify="left")
    return table
