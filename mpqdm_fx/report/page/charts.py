"""The charts of a part: bits, errors and bytes, each with its numbers as a table."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mpqdm_fx.report.page.noise_axis import group_label, levels_label
from mpqdm_fx.report.page.svg import (
    ACCENT,
    BAND,
    FAINT,
    INK,
    LINE,
    MUTED,
    SECOND,
    SERIES,
    Chart,
    Table,
    chart,
)
from mpqdm_fx.report.page.text import bits_text, bytes_text, db_text
from mpqdm_fx.report.record import LayerNumbers, PartRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "band_places",
    "bits_chart",
    "bytes_chart",
    "finite_or_nan",
    "heat_chart",
    "judged_chart",
    "levels_chart",
    "solve_chart",
]

_ORDER = "layer, in running order"


def bits_chart(part: PartRecord) -> Chart:
    """Bits of a weight along the model."""
    layers = part.layers

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        band_places(axes, layers, wide)
        colours = [FAINT if layer.reason else ACCENT for layer in layers]
        bars = axes.bar(
            range(len(layers)), [la.mean_bits for la in layers], width=0.82, color=colours
        )
        for index, bar in enumerate(bars):
            bar.set_gid(f"layer-{index}")
            bar.set_clip_on(False)
        axes.axhline(part.mean_bits, color=SECOND, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 8.6)
        axes.set_yticks([0, 2, 4, 6, 8])
        axes.set_ylabel("bits per weight")

    pinned = sum(1 for layer in layers if layer.reason)
    off = f"; {pinned} layers are off the budget (pale)" if pinned else ""
    return chart(
        f"{part.name}-bits",
        "Bits along the model",
        f"Average bits per weight of {len(layers)} layers, from {bits_text(_least(layers))} to "
        f"{bits_text(max((la.mean_bits for la in layers), default=0))}; {part.mean_bits:.2f} on "
        f"average over the budget (dashed){off}.",
        draw,
        height=2.5,
        narrow_height=2.1,
        titles=[f"{la.name}: {bits_text(la.mean_bits)} bits" for la in layers],
        table=Table(
            head=("layer", "bits"),
            rows=tuple((layer.name, bits_text(layer.mean_bits)) for layer in layers),
        ),
    )


def solve_chart(part: PartRecord) -> Chart | None:
    """Each layer's error with and without error propagation, and the strength that was chosen."""
    layers = part.layers
    known = [i for i, la in enumerate(layers) if _finite(la.sqnr_db)]
    if not known:
        return None
    rows = [i for i in known if _finite(layers[i].base_sqnr_db)]

    def draw(figure: "Figure", wide: bool) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        band_places(top, layers, wide)
        top.set_xlabel("")
        # one line with gaps: a line for each of many layers would make a large page
        ends = [y for i in rows for y in (layers[i].base_sqnr_db, layers[i].sqnr_db, math.nan)]
        top.plot([i for i in rows for _ in range(3)], ends, color=ACCENT, linewidth=1.4, alpha=0.45)
        top.plot(
            rows, [layers[i].base_sqnr_db for i in rows], "o", markersize=2.6, color=FAINT,
            label="without propagation",
        )  # fmt: skip
        top.plot(
            known, [layers[i].sqnr_db for i in known], "o", markersize=3, color=ACCENT,
            label="as it was solved",
        )  # fmt: skip
        top.set_ylabel("layer SQNR, dB")
        top.legend(loc="upper right", ncols=1 + wide, bbox_to_anchor=(1, 1.02), handlelength=1)
        _room(top)
        edges = [index - 0.5 for index in range(len(layers) + 1)]
        bottom.stairs([la.alpha for la in layers], edges, fill=True, color=SECOND)
        bottom.set(ylim=(0, 1.05), yticks=[0, 1], ylabel="strength", xlabel=_ORDER)
        bottom.set_xlim(-0.8, len(layers) - 0.2)

    gains = [(layers[i].sqnr_db or 0) - (layers[i].base_sqnr_db or 0) for i in rows]
    better = sum(1 for gain in gains if gain >= 0.05)
    maximum = f", {max(gains):.1f} dB at the most" if better else ""
    return chart(
        f"{part.name}-solve",
        "What error propagation brings",
        f"Signal-to-noise ratio of every layer's output on held-out rows, with and without making "
        f"up for the error that reaches it, and the strength of that (0 none, 1 all). It raises "
        f"{better} of {len(rows)} layers{maximum}.",
        draw,
        height=3.2,
        narrow_height=3.0,
        table=Table(
            head=("layer", "without dB", "solved dB", "strength"),
            rows=tuple(
                (la.name, db_text(la.base_sqnr_db), db_text(la.sqnr_db), f"{la.alpha:.2f}")
                for la in layers
            ),
        ),
    )


def levels_chart(part: PartRecord) -> Chart | None:
    """The output's error along a run."""
    if not part.levels:
        return None
    levels = [point.level for point in part.levels]
    graph = [point.sqnr_db for point in part.levels]
    backend = [math.nan if (db := point.backend_sqnr_db) is None else db for point in part.levels]
    pairs = zip(finite_or_nan(graph), finite_or_nan(backend), strict=True)
    apart = any(abs(a - b) > 0.05 for a, b in pairs)  # not of NaN

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        axes.plot(
            finite_or_nan(graph), "o-", color=ACCENT, linewidth=1.6, markersize=4, label="graph"
        )
        if apart:
            axes.plot(
                finite_or_nan(backend), "s--", color=SECOND, linewidth=1.2, markersize=3,
                label=str(part.backend),
            )  # fmt: skip
            axes.legend(loc="best")
        for index, value in enumerate(finite_or_nan(graph)):
            if wide and not math.isnan(value):
                axes.annotate(
                    f"{value:.1f}", (index, value), xytext=(0, 7), textcoords="offset points",
                    ha="center", color=INK,
                )  # fmt: skip
        axes.set_xticks(range(len(levels)), [f"{level:.4g}" for level in levels])
        axes.set_xlabel(levels_label(part))
        axes.set_ylabel("output SQNR, dB")
        axes.margins(x=0.04, y=0.2)
        _room(axes)

    none = "exact everywhere" if set(graph) == {math.inf} else "no numbers"
    finite = [value for value in graph if _finite(value)]
    span = f"{min(finite):.1f} to {max(finite):.1f} dB" if finite else none
    return chart(
        f"{part.name}-levels",
        "The error along a run",
        f"Signal-to-noise ratio of the output at {len(levels)} noise levels on held-out "
        f"inputs: {span}.",
        draw,
        height=2.4,
        narrow_height=2.1,
        table=Table(
            head=(str(part.noise_argument), "graph dB", f"{part.backend or 'backend'} dB"),
            rows=tuple(
                (f"{point.level:g}", db_text(point.sqnr_db), db_text(point.backend_sqnr_db))
                for point in part.levels
            ),
        ),
    )


def heat_chart(part: PartRecord) -> Chart | None:
    """Each layer's error at each noise level."""
    layers, levels = part.layers, part.levels
    if not levels or all(layer.by_level is None for layer in layers):
        return None
    blank = (math.nan,) * len(levels)
    rows = [finite_or_nan(layer.by_level) if layer.by_level else blank for layer in layers]
    values = [[row[level] for row in rows] for level in range(len(levels))]
    finite = sorted(v for row in values for v in row if not math.isnan(v))
    if not finite:  # all of it is exact
        return None
    low, high = finite[len(finite) // 50], finite[-1 - len(finite) // 50]

    def draw(figure: "Figure", wide: bool) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("sqnr", ["#b4442c", "#e8c07d", "#2a7f86"])
        image = axes.imshow(
            values, aspect="auto", interpolation="none", cmap=colours, vmin=low, vmax=high
        )
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_yticks(range(len(levels)), [f"{point.level:.4g}" for point in levels])
        axes.set_ylabel(str(part.noise_argument))
        axes.set_xlabel(_ORDER)
        _groups(axes, layers, wide)
        bar = figure.colorbar(
            image, ax=axes, pad=0.015 if wide else 0.02, aspect=18,
            location="right" if wide else "bottom",
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.set_label("layer SQNR, dB")

    return chart(
        f"{part.name}-heat",
        "Every layer at every noise level",
        f"Signal-to-noise ratio of every layer's output in the running model, errors of earlier "
        f"layers included: {len(layers)} layers by {len(levels)} noise levels, {low:.0f} dB "
        f"(red) to {high:.0f} dB (teal).",
        draw,
        height=2.7,
        narrow_height=2.9,
        table=Table(
            head=("layer", *(f"{point.level:.4g}" for point in levels)),
            rows=tuple(
                (layer.name, *(db_text(value) for value in layer.by_level or ()))
                for layer in layers
            ),
        ),
    )


def judged_chart(part: PartRecord) -> Chart | None:
    """The recipe and plain rounding by group of noise levels."""
    groups = max((len(score.by_group) for score in part.judged), default=0)
    if groups < 2:
        return None

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        for score, colour in zip(part.judged, (ACCENT, SECOND, FAINT, *SERIES[2:]), strict=False):
            values = [math.nan if value is None else value for value in score.by_group]
            label = score.recipe + (" (taken)" if score.chosen else "")
            axes.plot(
                range(1, groups + 1), values, "o-", color=colour, linewidth=1.5, markersize=3.5,
                label=label,
            )  # fmt: skip
        axes.set_xticks(range(1, groups + 1))
        axes.set_xlabel(group_label(part))
        axes.set_ylabel("output SQNR, dB")
        axes.legend(
            loc="lower right" if wide else "upper left", bbox_to_anchor=None if wide else (0, -0.28)
        )
        axes.margins(y=0.15)
        _room(axes)

    return chart(
        f"{part.name}-judged",
        "The recipe against plain rounding",
        "Output's signal-to-noise ratio on held-out calls: "
        + "; ".join(f"{score.recipe} {db_text(score.sqnr_db)} dB" for score in part.judged)
        + ".",
        draw,
        height=2.4,
        narrow_height=2.8,
        table=Table(
            head=("recipe", "all dB", *(f"group {i + 1} dB" for i in range(groups))),
            rows=tuple(
                (
                    score.recipe + (" (taken)" if score.chosen else ""),
                    db_text(score.sqnr_db),
                    *("exact" if value is None else db_text(value) for value in score.by_group),
                )
                for score in part.judged
            ),
        ),
    )


_KINDS = {
    "codes": "codes", "scales": "scales", "tables": "level tables", "widths": "width tags",
    "float_weights": "float weights", "float_remainder": "norms, biases",
}  # fmt: skip


def bytes_chart(part: PartRecord) -> Chart:
    """Where the bytes are."""
    sizes = {_KINDS[key]: size for key, size in part.bytes.model_dump().items() if size}
    program = part.program_bytes
    names = ["packed", *(["program"] if program is not None else [])]

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        scale, unit = _unit(max(part.stored_bytes, program or 0))
        left = 0.0
        for (name, size), colour in zip(sizes.items(), SERIES, strict=False):
            axes.barh([0], [size / scale], left=[left], height=0.55, color=colour, label=name)
            left += size / scale
        axes.annotate(
            bytes_text(part.stored_bytes), (left, 0), xytext=(5, 0), textcoords="offset points",
            va="center", color=INK,
        )  # fmt: skip
        if program is not None:
            axes.barh([1], [program / scale], height=0.55, color=FAINT, label="program, whole")
            axes.annotate(
                bytes_text(program), (program / scale, 1), xytext=(5, 0),
                textcoords="offset points", va="center", color=INK,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(unit)
        axes.margins(x=0.14)
        figure.legend(loc="outside upper left", ncols=6 if wide else 2, handlelength=1)

    kinds = ", ".join(f"{name} {bytes_text(size)}" for name, size in sizes.items())
    sentence = f" The program takes {bytes_text(program)}." if program is not None else ""
    rows = [(name, f"{size:,}") for name, size in sizes.items()]
    rows += [(f"file {name}", f"{size:,}") for name, size in part.files.items()]
    rows.append(("float32", f"{part.float32_bytes:,}"))
    return chart(
        f"{part.name}-bytes",
        "Where the bytes are",
        f"Packed weights take {bytes_text(part.stored_bytes)}, float32 "
        f"{bytes_text(part.float32_bytes)}: {kinds}.{sentence}",
        draw,
        height=1.0 + 0.45 * len(names),
        narrow_height=1.5 + 0.4 * len(names),
        table=Table(head=("what", "bytes"), rows=tuple(rows)),
    )


def _unit(size: float) -> tuple[float, str]:
    return (1e6, "MB") if size >= 1e6 else (1e3, "kB")


def _least(layers: Sequence[LayerNumbers]) -> float:
    return min((layer.mean_bits for layer in layers), default=0.0)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def finite_or_nan(values: Sequence[float]) -> tuple[float, ...]:
    """What cannot be drawn, an exact value among them, is left out."""
    return tuple(value if math.isfinite(value) else math.nan for value in values)


def band_places(axes: "Axes", layers: Sequence[LayerNumbers], wide: bool) -> None:
    """Where the model goes down, is in the middle, and goes up."""
    for index, (_, start, end) in enumerate(_places(layers)):
        if index % 2:
            axes.axvspan(start - 0.5, end - 0.5, color=BAND, linewidth=0, zorder=0)
    axes.set_xlim(-0.8, len(layers) - 0.2)
    _groups(axes, layers, wide)
    axes.set_xlabel(_ORDER)


def _groups(axes: "Axes", layers: Sequence[LayerNumbers], wide: bool) -> None:
    axes.set_xticks([])
    places = _places(layers)
    for name, start, end in places:
        if name == "model" or (end - start) / len(layers) < (0.03 if wide else 0.08):
            continue
        middle: Any = (start + end - 1) / 2
        axes.annotate(
            name, (middle, 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
            textcoords="offset points", ha="center", color=MUTED, annotation_clip=False,
        )  # fmt: skip
    for _, start, _end in places[1:]:
        axes.axvline(start - 0.5, color=LINE, linewidth=0.8)


def _places(layers: Sequence[LayerNumbers]) -> list[tuple[str, int, int]]:
    """Runs of layers at one place: name, first, behind the last."""
    places, start = [], 0
    for place, run in groupby(layers, key=lambda layer: layer.place):
        end = start + len(list(run))
        places.append((str(place), start, end))
        start = end
    return places


def _room(axes: "Axes") -> None:
    """A fifth more above the values, for what is written there."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.18 * (high - low))
