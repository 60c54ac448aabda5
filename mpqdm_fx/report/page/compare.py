"""Several folders of one float model side by side: table, charts, pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpqdm_fx.report.page import text
from mpqdm_fx.report.page.charts import band_places, finite_or_nan
from mpqdm_fx.report.page.gallery import Gallery
from mpqdm_fx.report.page.noise_axis import from_noise, levels_label, told_of
from mpqdm_fx.report.page.render import page_environment, setting_text
from mpqdm_fx.report.page.svg import INK, SERIES, Chart, Table, chart
from mpqdm_fx.report.record import PartRecord, ReportRecord
from mpqdm_fx.report.words import word_of_sqnr

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ComparedRow", "compared_rows", "render_compare"]


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """One number of every folder.

    Attributes:
        name: What it is.
        values: As text, folder by folder.
        best: Folders that do best; none where all are alike or neither way is better.
    """

    name: str
    values: tuple[str, ...]
    best: frozenset[int]


_Number = Callable[[PartRecord], float | None]
_Text = Callable[[float], str]


def _decimals(count: int) -> _Text:
    return lambda value: f"{value:,.{count}f}"


#: What is compared: name, number, its text, whether more is better (None: neither).
_NUMBERS: tuple[tuple[str, _Number, _Text, bool | None], ...] = (
    ("what is shipped", lambda p: p.shipped_bytes, text.bytes_text, False),
    ("packed weights", lambda p: p.stored_bytes, text.bytes_text, False),
    ("program on disk", lambda p: p.program_bytes, text.bytes_text, False),
    ("average bits over the budget", lambda p: p.mean_bits, text.bits_text, None),
    ("bits of all weights, all overhead", lambda p: p.effective_bits, text.bits_text, False),
    ("noise SQNR, graph, dB", lambda p: p.epsilon_sqnr_db, text.db_text, True),
    ("noise SQNR, backend, dB", lambda p: p.backend_epsilon_sqnr_db, text.db_text, True),
    ("worst layer SQNR, dB", lambda p: _worst(p), text.db_text, True),
    ("ms a step, batch 1", lambda p: p.milliseconds, _decimals(1), False),
    ("peak memory", lambda p: p.peak_bytes, text.bytes_text, False),
    (
        "XNNPACK subgraphs",
        lambda p: p.program.subgraphs if p.program else None,
        _decimals(0),
        False,
    ),
    (
        "nodes outside them",
        lambda p: p.program.undelegated if p.program else None,
        _decimals(0),
        False,
    ),
    ("layers in own kernels", lambda p: _of_program(p, "own_layers"), _decimals(0), None),
    ("crossings to own kernels", lambda p: _of_program(p, "crossings"), _decimals(0), False),
    ("layout copies", lambda p: _of_program(p, "layout_copies"), _decimals(0), False),
    ("layers", lambda p: len(p.layers), _decimals(0), None),
    ("seconds to quantize", lambda p: p.seconds_to_quantize, _decimals(0), None),
)


def compared_rows(
    parts: Sequence[PartRecord], x0_sqnr_db: Sequence[float] | None = None
) -> list[ComparedRow]:
    """The table of all numbers; a number that no folder knows has no row.

    Args:
        parts: One of each folder.
        x0_sqnr_db: Of samples from the same noise against the float model's, where they were drawn.
    """
    rows = [
        _row(name, [of(p) for p in parts], to_text, more) for name, of, to_text, more in _NUMBERS
    ]
    if x0_sqnr_db is not None:
        drawn = _row("samples from the same noise, dB", list(x0_sqnr_db), text.db_text, True)
        rows.insert(7, drawn)
    return [row for row in rows if any(value != text.NONE for value in row.values)]


def _row(
    name: str, values: Sequence[float | None], to_text: _Text, more: bool | None
) -> ComparedRow:
    known = [value for value in values if value is not None and not math.isnan(value)]
    best: frozenset[int] = frozenset()
    if more is not None and len(set(known)) > 1:
        extreme = max(known) if more else min(known)
        best = frozenset(i for i, value in enumerate(values) if value == extreme)
    shown = tuple(text.NONE if value is None else to_text(value) for value in values)
    return ComparedRow(name=name, values=shown, best=best)


def _of_program(part: PartRecord, name: str) -> float | None:
    """A number of own kernels; None of a program without any."""
    if part.program is None or not part.program.own_layers:
        return None
    value = getattr(part.program, name)
    return float(len(value) if isinstance(value, tuple) else value)


def _worst(part: PartRecord) -> float | None:
    known = [la.sqnr_db for la in part.layers if la.sqnr_db is not None]
    return min(known, default=None)


def render_compare(
    names: Sequence[str],
    records: Sequence[ReportRecord],
    gallery: Gallery | None,
    *,
    x0_sqnr_db: Sequence[float] | None,
    why_no_gallery: str = "",
) -> str:
    """The page of several folders.

    Args:
        names: What the folders are called, each another name.
        records: Their numbers, in the same order.
        gallery: Pictures from the same noise; None where there are none.
        x0_sqnr_db: As of `compared_rows`.
        why_no_gallery: Said where there are no pictures.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    parts = [from_noise(record.parts[0]) for record in records]
    drawn = (_levels(names, parts), _trade(names, parts), _bits(names, parts))
    return (
        page_environment()
        .get_template("compare.html.j2")
        .render(
            names=names,
            records=records,
            rows=compared_rows(parts, x0_sqnr_db),
            settings=_different_settings(parts),
            charts=[figure for figure in drawn if figure is not None],
            gallery=gallery,
            why_no_gallery=why_no_gallery,
            words=[
                "" if p.epsilon_sqnr_db is None else word_of_sqnr(p.epsilon_sqnr_db) for p in parts
            ],
        )
    )


def _different_settings(parts: Sequence[PartRecord]) -> list[tuple[str, ...]]:
    keys: Mapping[str, None] = dict.fromkeys(key for part in parts for key in part.settings)
    rows = [(key, *(setting_text(part.settings.get(key)) for part in parts)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _levels(names: Sequence[str], parts: Sequence[PartRecord]) -> Chart | None:
    """Output's error along a run, of every folder."""
    known = [(name, part) for name, part in zip(names, parts, strict=True) if part.levels]
    if not known:
        return None
    first = known[0][1]

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        for (name, part), colour in zip(known, _colours(len(known)), strict=True):
            levels = [point.level for point in part.levels]
            values = finite_or_nan([point.sqnr_db for point in part.levels])
            axes.plot(levels, values, "o-", color=colour, linewidth=1.6, markersize=4, label=name)
        if told_of(first) != "cleanness":
            axes.invert_xaxis()
        axes.set_xlabel(levels_label(first))
        axes.set_ylabel("output SQNR, dB")
        figure.legend(loc="outside upper left", ncols=4 if wide else 1)

    rows = [
        (name, f"{point.level:g}", text.db_text(point.sqnr_db))
        for name, part in known
        for point in part.levels
    ]
    return chart(
        "levels",
        "The error along a run",
        "Signal-to-noise ratio of the output by noise level, of every folder.",
        draw,
        height=2.7,
        narrow_height=2.3 + 0.17 * len(known),
        table=Table(head=("folder", str(first.noise_argument), "dB"), rows=tuple(rows)),
    )


def _trade(names: Sequence[str], parts: Sequence[PartRecord]) -> Chart | None:
    """Bytes against noise SQNR."""
    known = [
        (name, part.shipped_bytes, part.epsilon_sqnr_db)
        for name, part in zip(names, parts, strict=True)
        if part.epsilon_sqnr_db is not None and math.isfinite(part.epsilon_sqnr_db)
    ]
    if len(known) < 2:
        return None

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        for (name, size, db), colour in zip(known, _colours(len(known)), strict=True):
            axes.plot([size / 1e6], [db], "o", color=colour, markersize=7, label=name)
            if wide:
                axes.annotate(
                    name, (size / 1e6, db), xytext=(0, 8), textcoords="offset points",
                    ha="center", color=INK,
                )  # fmt: skip
        if not wide:
            figure.legend(loc="outside upper left", ncols=1)
        axes.margins(x=0.15, y=0.25)
        axes.set_xlabel("shipped, MB")
        axes.set_ylabel("noise SQNR, dB")

    return chart(
        "trade",
        "Bytes against errors",
        "Up and to the left is better: "
        + "; ".join(f"{n}, {text.bytes_text(size)} and {db:.1f} dB" for n, size, db in known)
        + ".",
        draw,
        height=2.7,
        narrow_height=2.3 + 0.17 * len(known),
        table=Table(
            head=("folder", "bytes", "noise SQNR dB"),
            rows=tuple((n, f"{size:,}", text.db_text(db)) for n, size, db in known),
        ),
    )


def _bits(names: Sequence[str], parts: Sequence[PartRecord]) -> Chart | None:
    """Bits along the model, where the folders have the same layers."""
    layers = parts[0].layers
    if any([la.name for la in part.layers] != [la.name for la in layers] for part in parts):
        return None

    def draw(figure: "Figure", wide: bool) -> None:
        axes = figure.subplots()
        band_places(axes, layers, wide)
        for name, part, colour in zip(names, parts, _colours(len(parts)), strict=True):
            bits = [layer.mean_bits for layer in part.layers]
            axes.step(range(len(bits)), bits, where="mid", color=colour, linewidth=1.5, label=name)
        axes.set_ylim(0, 8.6)
        axes.set_ylabel("bits per weight")
        figure.legend(loc="outside lower left", ncols=4 if wide else 1)

    rows = [
        (layer.name, *(text.bits_text(part.layers[i].mean_bits) for part in parts))
        for i, layer in enumerate(layers)
    ]
    return chart(
        "bits",
        "Bits along the model",
        f"Average bits per weight of {len(layers)} layers in every folder.",
        draw,
        height=2.8,
        narrow_height=2.3 + 0.17 * len(parts),
        table=Table(head=("layer", *names), rows=tuple(rows)),
    )


def _colours(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]
