"""A ladder as tables: every form of a quantized model against the one before."""

import math

from mpqdm_fx.backends.xnnpack.reference import CLOSE_DB
from mpqdm_fx.cli.screens.columns import Column, Columns
from mpqdm_fx.parity.ladder import Ladder, NodeParity, Rung

__all__ = ["rung_table", "worst_table"]


def rung_table(ladder: Ladder) -> Columns:
    """One row per rung: its outputs against float and the rung before, and its lowest layer.

    Where thresholds are stored, what is wanted stands behind a stroke. `alone` is the lowest layer
    where each layer reads the values of the rung before.
    """
    table = Columns(
        f"rungs: SQNR in dB over {ladder.calls} calls / what is wanted",
        [
            Column(heading="rung", kind="name"),
            Column(heading="float"),
            Column(heading="against", kind="name"),
            Column(heading=""),
            Column(heading="lowest layer"),
            Column(heading="alone"),
            Column(heading="layers", spare=2),
            Column(heading="values", spare=1),
            Column(heading="", kind="name"),
        ],
    )
    for rung in ladder.rungs:
        layers = rung.layers
        table.add(
            rung.name,
            _judged(rung.float_db, rung.wanted_float_db),
            rung.against or "",
            _judged(rung.previous_db, rung.wanted_db),
            _decibels(min((node.sqnr_db for node in layers), default=None)),
            _decibels(min((node.own_db for node in layers), default=None)),
            str(len(layers)) if layers else "",
            str(len(rung.nodes)) if rung.nodes else "",
            _state(ladder, rung),
        )
    return table


def worst_table(ladder: Ladder, *, count: int = 3) -> Columns:
    """The layers of each rung that fall short or are lowest; what is close enough is left out.

    Args:
        ladder: The ladder.
        count: Layers of each rung.
    """
    table = Columns(
        "lowest layers: SQNR in dB / what is wanted",
        [
            Column(heading="rung", kind="name"),
            Column(heading="layer", kind="name"),
            Column(heading="op", kind="name", spare=1),
            Column(heading="SQNR"),
            Column(heading="alone"),
            Column(heading="", kind="name"),
        ],
    )
    for rung in ladder.rungs:
        shown = [node for node in rung.layers if node.short or node.sqnr_db < CLOSE_DB]
        for node in sorted(shown, key=_rank)[:count]:
            table.add(
                rung.name,
                str(node.site),
                f"{node.site.op} {'x'.join(map(str, node.shape))}",
                _judged(node.sqnr_db, node.wanted_db),
                _judged(node.own_db, node.wanted_own_db),
                "short" if node.short else "",
            )
    return table


def _rank(node: NodeParity) -> tuple[bool, bool, float]:
    return not node.short_alone, not node.short, node.sqnr_db


def _state(ladder: Ladder, rung: Rung) -> str:
    if ladder.passed is None or rung.against is None:
        return ""
    return "short" if rung.short else "ok"


def _judged(value: float | None, bound: float | None) -> str:
    if value is None or bound is None:
        return _decibels(value)
    return f"{_decibels(value)} / {_decibels(bound)}"


def _decibels(value: float | None) -> str:
    if value is None:
        return ""
    return "equal" if value == math.inf else f"{value:.1f}"
