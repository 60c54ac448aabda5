"""Tables of an evaluation, within 80 columns: what was measured, in words, what was wanted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mpqdm_fx.report.gates import METRICS, Verdict
from mpqdm_fx.report.words import WORD_SCALES, word_of

__all__ = ["evaluation_table", "gate_table", "shown"]

_SETTINGS = ("num_samples", "num_inference_steps", "seed")
_LEVEL = "epsilon_sqnr_at_"


def evaluation_table(metrics: Mapping[str, Any]) -> Table:
    """One row a metric: its value, and what that means.

    Args:
        metrics: Of `evaluate_folder`.
    """
    table = Table(title="against the float model", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("in words", overflow="fold")
    for name, value in metrics.items():
        if name in METRICS:
            table.add_row(name, shown(name, value), _words(name, value, metrics))
        elif name.startswith(_LEVEL):
            level = Text(f"  at {name.removeprefix(_LEVEL).replace('_', ' ')}")
            table.add_row(level, shown("epsilon_sqnr", value), word_of("epsilon_sqnr", value))
    settings = [metrics.get(name) for name in _SETTINGS]
    if settings[0] is not None:
        steps = "" if settings[1] is None else f"{settings[1]} steps, "
        table.caption = f"{settings[0]} samples of the same noise, {steps}seed {settings[2]}"
    return table


def gate_table(verdicts: Sequence[Verdict]) -> Table:
    """One row a gate: what was wanted, what was measured, whether that is enough.

    Args:
        verdicts: Of `gates.judge`.
    """
    table = Table(title="gates", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("metric", no_wrap=True)
    table.add_column("wanted", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for verdict in verdicts:
        gate = verdict.gate
        word, style = ("passed", "green") if verdict.passed else ("FAILED", "bold red")
        table.add_row(
            gate.metric,
            f"{gate.comparison} {shown(gate.metric, gate.bound)}",
            shown(gate.metric, verdict.measured),
            Text(word, style=style),
        )
    return table


def shown(metric: str, value: float) -> str:
    """A metric's value for people, with its unit.

    Args:
        metric: Name as of `METRICS`.
        value: In the metric's unit.
    """
    unit = METRICS[metric].unit
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    if unit == "bytes":
        return f"{value:,.0f} B"
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "":
        return f"{value:,.0f}" if metric == "subgraphs" else f"{value:.4g}"
    digits = 3 if unit == "bits" else 2
    return f"{value:.{digits}f} {'x' if unit == 'times' else unit}"


def _words(name: str, value: float, metrics: Mapping[str, Any]) -> str:
    floats = metrics.get(f"reference_{name}")
    if floats is not None:
        return f"float: {shown(name, floats)}"
    scale, samples = WORD_SCALES.get(name), metrics.get("num_samples")
    if scale is not None and samples is not None and samples < scale.samples:
        return f"no word below {scale.samples} samples"
    return word_of(name, value)
