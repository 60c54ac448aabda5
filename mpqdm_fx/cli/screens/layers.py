"""Layers and inputs of a quantized model, as tables."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from mpqdm_fx.cli.screens.columns import Column, Columns
from mpqdm_fx.records.report import LayerReport, QuantizationReport

__all__ = ["ORDERS", "activation_table", "judgement_table", "layer_table"]

_SHOWN = 12  # inputs whose rounding costs most

#: Orders of the layers: what comes first.
ORDERS: dict[str, Callable[[LayerReport], Any]] = {
    "bits": lambda layer: layer.mean_bits,
    "bytes": lambda layer: -layer.bytes,
    "sqnr": lambda layer: math.inf if layer.sqnr_db is None else layer.sqnr_db,
    "name": lambda layer: layer.name,
}


def layer_table(
    report: QuantizationReport, *, order: str | None = None, top: int | None = None
) -> Columns:
    """One row per quantized layer: shape, mean bits, bytes, SQNR, and why it is pinned.

    `gain` is what error propagation brought on held-out rows, in dB, at the strength `alpha`.

    Args:
        report: The record of `convert`.
        order: One of `ORDERS`: fewest bits, most bytes, lowest SQNR, or names first; None for the
            model's own.
        top: How many rows; None for all.
    """
    table = Columns(
        "layers",
        [
            Column(heading="layer", kind="name"),
            Column(heading="weight", spare=4),
            Column(heading="bits"),
            Column(heading="mixed", spare=2),
            Column(heading="bytes"),
            Column(heading="SQNR dB"),
            Column(heading="gain", spare=3),
            Column(heading="alpha", spare=1),
            Column(heading="pinned", kind="text", spare=5),
        ],
    )
    layers = list(report.layers)
    if order is not None:
        layers.sort(key=ORDERS[order])
    for layer in layers[:top]:
        table.add(
            layer.name,
            "x".join(str(size) for size in layer.shape),
            f"{layer.mean_bits:.2f}",
            _mixed(layer),
            f"{layer.bytes:,}",
            "" if layer.sqnr_db is None else f"{layer.sqnr_db:.1f}",
            _gain(layer),
            f"{layer.alpha:.2f}" if layer.alpha else "",
            layer.reason or "",
        )
    if len(layers) > len(layers[:top]):
        table.note = f"{len(layers) - len(layers[:top])} more layers"
    return table


def activation_table(report: QuantizationReport) -> Columns:
    """One row per input, the dearest first: what its rounding alone does, and what was chosen.

    `as it is` is the noise of the model's output from rounding this input to 8 bits as it is, in dB
    below the output, `chosen` the same with what was chosen; inputs that cost least share a row.
    """
    table = Columns(
        "inputs of layers: noise at the output from rounding each, dB below it",
        [
            Column(heading="input of", kind="name"),
            Column(heading="as it is"),
            Column(heading="chosen"),
            Column(heading="time", spare=1),
            Column(heading="what was chosen", kind="text"),
        ],
    )
    ordered = sorted(report.activations, key=lambda choice: -choice.quantized_cost)
    for choice in ordered[:_SHOWN]:
        first, *others = choice.layers
        table.add(
            first + (f" and {len(others)} more" if others else ""),
            _noise(choice.quantized_cost),
            _noise(choice.cost),
            f"{choice.slowdown:+.1%}" if choice.slowdown >= 5e-4 else "",
            choice.told,
        )
    rest = ordered[_SHOWN:]
    if rest:
        counts = Counter(choice.told for choice in rest)
        table.add(
            f"{len(rest)} others",
            _noise(sum(choice.quantized_cost for choice in rest)),
            _noise(sum(choice.cost for choice in rest)),
            f"{sum(choice.slowdown for choice in rest):+.1%}",
            ", ".join(f"{count} {text}" for text, count in counts.most_common()),
        )
    return table


def _noise(share: float) -> str:
    return f"{-10 * math.log10(share):.1f}" if share > 0 else ""


def judgement_table(report: QuantizationReport) -> Columns:
    """The recipe and plain rounding at the model's output, on held-out calls, by noise level."""
    groups = max((len(judgement.sqnr_db) for judgement in report.judged), default=0)
    levels = range(groups if groups > 1 else 0)
    table = Columns(
        "held-out calls: SQNR of the output in dB, all and by noise level",
        [
            Column(heading="", kind="name"),
            Column(heading="all"),
            *(Column(heading=str(index + 1), spare=groups - index) for index in levels),
        ],
    )
    for judgement in report.judged:
        decibels = ["" if db is None else f"{db:.1f}" for db in judgement.sqnr_db]
        name = judgement.recipe + (" (taken)" if judgement.chosen else "")
        table.add(name, f"{judgement.decibels:.1f}", *(decibels[index] for index in levels))
    fitted = [layer for layer in report.layers if layer.rows]
    propagated = sum(1 for layer in fitted if layer.alpha or layer.beta)
    refitted = sum(1 for layer in fitted if layer.refitted)
    if fitted:
        table.note = (
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
