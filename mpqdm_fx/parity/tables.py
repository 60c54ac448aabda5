"""A ladder as tables for the terminal."""

import math

from rich import box
from rich.table import Table

from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB
from mpqdm_fx.parity.ladder import Ladder, NodeParity, Rung

__all__ = ["rung_table", "worst_table"]


def rung_table(ladder: Ladder) -> Table:
    """One row per rung: its outputs against float and the rung before, and its lowest layer.

    `alone` is the lowest layer where each layer reads the values of the rung before.
    """
    table = Table(
        title=f"rungs, SQNR in dB over {ladder.calls} calls", header_style="bold",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for heading in ("rung", "against"):
        table.add_column(heading, no_wrap=True)
    for heading in ("float", "wanted", "against", "wanted", "layers", "lowest", "alone", "values"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for rung in ladder.rungs:
        layers = rung.layers
        table.add_row(
            rung.name,
            rung.against or "",
            _decibels(rung.float_db),
            _decibels(rung.wanted_float_db),
            _decibels(rung.previous_db),
            _decibels(rung.wanted_db),
            str(len(layers)) if layers else "",
            _decibels(min((node.sqnr_db for node in layers), default=None)),
            _decibels(min((node.own_db for node in layers), default=None)),
            str(len(rung.nodes)) if rung.nodes else "",
            _state(ladder, rung),
        )
    return table


def worst_table(ladder: Ladder, *, count: int = 3) -> Table:
    """The layers of each rung that fall short or are lowest; what is close enough is left out.

    Args:
        ladder: The ladder.
        count: Layers of each rung.
    """
    table = Table(title="lowest layers", header_style="bold", box=box.SIMPLE_HEAD)
    for heading in ("rung", "layer", "op"):
        table.add_column(heading, no_wrap=True)
    for heading in ("SQNR dB", "wanted", "alone", "wanted"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for rung in ladder.rungs:
        shown = [node for node in rung.layers if node.short or node.sqnr_db < CLOSE_DB]
        for node in sorted(shown, key=_rank)[:count]:
            table.add_row(
                rung.name,
                str(node.site),
                f"{node.site.op} {list(node.shape)}",
                _decibels(node.sqnr_db),
                _decibels(node.wanted_db),
                _decibels(node.own_db),
                _decibels(node.wanted_own_db),
                "[red]short[/]" if node.short else "",
            )
    return table


def _rank(node: NodeParity) -> tuple[bool, bool, float]:
    return not node.short_alone, not node.short, node.sqnr_db


def _state(ladder: Ladder, rung: Rung) -> str:
    if ladder.passed is None or rung.against is None:
        return ""
    return "[red]short[/]" if rung.short else "ok"


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}"
