"""A page of several budgets of one model: size against quality, and what each of them draws."""

import base64
import math
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqdm_fx.report.evaluation_tables import shown
from mpqdm_fx.report.gates import METRICS, Gate, parse_gates
from mpqdm_fx.report.page.render import page_environment
from mpqdm_fx.report.page.svg import ACCENT, INK, LINE, SECOND, Chart, Table, chart
from mpqdm_fx.report.page.text import bytes_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render_pareto"]

_CHARTS = {
    "epsilon_sqnr": "Noise: one call against float",
    "x0_sqnr": "Samples against float's",
    "frechet_distance": "Frechet distance of the samples",
}


def render_pareto(record: Mapping[str, Any], strips: Mapping[str, Path]) -> str:
    """One HTML file that needs no other.

    Args:
        record: Content of `pareto.json`, numbers as numbers.
        strips: PNG of a row of samples by what drew them, the float model first.
    """
    points = record["points"]
    gates = parse_gates(record["pick"], "pick")
    named = [name for name in _CHARTS if all(name in point["metrics"] for point in points)]
    return (
        page_environment()
        .get_template("pareto.html.j2")
        .render(
            model=record["model"],
            title=f"{len(points)} budgets, {_listed(points)} bits",
            verdict=_verdict(record, gates),
            charts=[_chart(name, points, record["picked"], gates) for name in named],
            head=("bits", "stored bits", "size", "of float", *map(_heading, _columns(points))),
            rows=[_row(point, points) for point in points],
            strips=[(name, *_picture(path)) for name, path in strips.items()],
            evaluation=record["evaluation"],
            commands=[(f"{p['bits']:g} bits", p["command"]) for p in points if p["command"]],
            versions=record["versions"],
        )
    )


def _listed(points: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{point['bits']:g}" for point in points)


def _verdict(record: Mapping[str, Any], gates: Sequence[Gate]) -> str:
    if not gates:
        return "Smaller is to the left, better is up; take the smallest that is good enough."
    conditions = " and ".join(map(str, gates))
    if record["picked"] is None:
        return f"No budget reaches {conditions}."
    return f"{record['picked']:g} bits is the smallest budget that reaches {conditions}."


def _columns(points: Sequence[Mapping[str, Any]]) -> list[str]:
    without = {"bytes", "parameter_bytes", "effective_bits"}
    return [name for name in METRICS if name in points[0]["metrics"] and name not in without]


def _heading(name: str) -> str:
    return re.sub("sqnr|psnr|ssim", lambda match: match[0].upper(), name.replace("_", " "))


def _row(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    metrics = point["metrics"]
    size = metrics["parameter_bytes"]
    return (
        f"{point['bits']:g}",
        f"{metrics['effective_bits']:.3f}",
        bytes_text(size),
        f"{100 * size / point['float32_bytes']:.1f} %",
        *(shown(name, metrics.get(name, math.nan)) for name in _columns(points)),
    )


def _chart(
    name: str,
    points: Sequence[Mapping[str, Any]],
    picked: float | None,
    gates: Sequence[Gate],
) -> Chart:
    """Size of the parameters against one metric."""
    drawn = [point for point in points if math.isfinite(point["metrics"][name])]
    sizes = [point["metrics"]["parameter_bytes"] / 1e3 for point in drawn]
    values = [point["metrics"][name] for point in drawn]
    bounds = [gate.bound for gate in gates if gate.metric == name]
    unit = METRICS[name].unit

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        axes.plot(sizes, values, color=LINE, linewidth=1.2, zorder=1)
        for point, size, value in zip(drawn, sizes, values, strict=True):
            colour = SECOND if point["bits"] == picked else ACCENT
            axes.plot([size], [value], "o", color=colour, markersize=6, zorder=2)
            axes.annotate(
                f"{point['bits']:g} bits", (size, value), xytext=(0, 7), ha="center",
                textcoords="offset points", color=INK,
            )  # fmt: skip
        for bound in bounds:
            axes.axhline(bound, color=SECOND, linestyle="--", linewidth=1)
        axes.set_xlabel("parameters, kB")
        axes.set_ylabel(f"{_heading(name)}{f', {unit}' if unit else ''}")
        axes.margins(x=0.12, y=0.22)

    better = "up" if METRICS[name].higher_is_better else "down"
    listing = "; ".join(
        f"{point['bits']:g} bits {shown(name, value)} in {size:,.0f} kB"
        for point, size, value in zip(drawn, sizes, values, strict=True)
    )
    if not drawn:
        ratios = "; ".join(f"{p['bits']:g} bits {shown(name, p['metrics'][name])}" for p in points)
        listing = f"none of them can be drawn ({ratios})"
    return chart(
        name,
        _CHARTS[name],
        f"Better is {better}, smaller is to the left: {listing}.",
        draw,
        height=3.2,
        narrow_height=2.6,
        table=Table(
            head=("bits", "bytes", _heading(name)),
            rows=tuple(
                (
                    f"{point['bits']:g}",
                    f"{point['metrics']['parameter_bytes']:,.0f}",
                    shown(name, point["metrics"][name]),
                )
                for point in points
            ),
        ),
    )


def _picture(path: Path) -> tuple[str, int, int]:
    """A PNG as a `data:` address, its width and its height."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])  # of the header, which comes first
    return f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height
