"""A ladder as tables for the terminal."""

import math

from rich import box
from rich.table import Table

from mpqdm_fx.parity.ladder import Ladder, NodeParity, Rung

__all__ = ["rung_table", "worst_table"]


def rung_table(ladder: Ladder) -> Table:
    """One row per rung: outputs against float and the rung before, layers, what is wanted."""
    table = Table(
        title=f"rungs, SQNR in dB over {ladder.calls} calls", header_style="bold",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for heading in ("rung", "against"):
        table.add_column(heading, no_wrap=True)
    for heading in ("float", "wanted", "against", "wanted", "layers", "values", "lowest layer"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for rung in ladder.rungs:
        layers = [node.sqnr_db for node in rung.layers]
        table.add_row(
            rung.name,
            rung.against or "",
            _decibels(rung.float_db),
            _decibels(rung.wanted_float_db),
            _decibels(rung.previous_db),
            _decibels(rung.wanted_db),
            str(len(layers)) if layers else "",
            str(len(rung.nodes)) if rung.nodes else "",
            _decibels(min(layers, default=None)),
            _state(ladder, rung),
        )
    return table


def worst_table(ladder: Ladder, *, count: int = 3) -> Table:
    """The layers of each rung that are nearest to their thresholds, or lowest without any.

    Args:
        ladder: The ladder.
        count: Layers of each rung.
    """
    table = Table(title="nearest to what is wanted", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("rung", "layer", "op"):
        table.add_column(heading, no_wrap=True)
    for heading in ("SQNR dB", "wanted"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rung in ladder.rungs:
        for node in sorted(rung.layers, key=_slack)[:count]:
            table.add_row(
                rung.name,
                str(node.site),
                f"{node.site.op} {list(node.shape)}",
                _decibels(node.sqnr_db),
                _decibels(node.wanted_db),
            )
    return table


def _slack(node: NodeParity) -> float:
    return node.sqnr_db - (node.wanted_db or 0.0)


def _state(ladder: Ladder, rung: Rung) -> str:
    if ladder.passed is None or rung.against is None:
        return ""
    return "[red]short[/]" if rung.short else "ok"


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}"
