"""Charts by matplotlib as parts of a page: inline, in the page's own colours and fonts.

Every chart is drawn twice, for a wide and for a narrow screen, and the page shows one of them: text
in a drawing that is made smaller as a whole cannot be read on a phone. Colours are placeholders
while matplotlib draws, and the page's CSS variables behind it, so that both themes are right.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "BAND",
    "FAINT",
    "INK",
    "LINE",
    "MUTED",
    "PAPER",
    "SECOND",
    "SERIES",
    "Chart",
    "Drawing",
    "Table",
    "chart",
]

INK, MUTED, LINE, PAPER = "#010101", "#010102", "#010103", "#010104"
ACCENT, SECOND, FAINT, BAND = "#010105", "#010106", "#010107", "#010108"
SERIES = (ACCENT, SECOND, "#010109", "#01010a", "#01010b", "#01010c")
"""Placeholders of the colours of a page, each the value of a CSS variable in the end."""

_VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper", ACCENT: "--accent",
    SECOND: "--second", FAINT: "--faint", BAND: "--band", SERIES[2]: "--third",
    SERIES[3]: "--fourth", SERIES[4]: "--fifth", SERIES[5]: "--sixth",
}  # fmt: skip

_WIDE, _NARROW = 10.0, 3.7  # inches of 72 units: text of 8 units is as large on either screen
_STYLE: Any = {  # one type of matplotlib's for each of its 300 keys
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "ytick.left": False,
}

Drawing = Callable[["Figure", bool], None]
"""Draws into a figure; told whether the screen is wide."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The same numbers as text.

    Attributes:
        head: Headings.
        rows: Cells, one row each.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of a page.

    Attributes:
        name: Its name in the page.
        title: What it shows.
        text: What a reader who sees no picture is told.
        wide: For wide screens, an `<svg>` element.
        narrow: The same for narrow ones.
        table: Its numbers; None where they stand beside it.
    """

    name: str
    title: str
    text: str
    wide: str
    narrow: str
    table: Table | None


def chart(
    name: str,
    title: str,
    text: str,
    draw: Drawing,
    *,
    height: float,
    narrow_height: float | None = None,
    titles: Sequence[str] = (),
    table: Table | None = None,
) -> Chart:
    """Draw a chart for both screens.

    Args:
        name: Its name in the page.
        title: What it shows.
        text: What a reader who sees no picture is told.
        draw: Draws it; elements called `layer-N` get `titles[N]` as a tooltip.
        height: Inches for a wide screen.
        narrow_height: Inches for a narrow one; by default the same.
        titles: Tooltips of layers.
        table: Its numbers.
    """
    sizes = {True: (_WIDE, height), False: (_NARROW, narrow_height or height)}
    drawn = {
        wide: _svg(f"{name}-{'w' if wide else 'n'}", title, text, draw, size, wide, titles)
        for wide, size in sizes.items()
    }
    return Chart(
        name=name, title=title, text=text, wide=drawn[True], narrow=drawn[False], table=table
    )


def _svg(
    name: str,
    title: str,
    text: str,
    draw: Drawing,
    size: tuple[float, float],
    wide: bool,
    titles: Sequence[str],
) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    file = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, wide)
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return _inlined(file.getvalue(), name, f"{title}. {text}", wide, titles)


def _inlined(svg: str, name: str, label: str, wide: bool, titles: Sequence[str]) -> str:
    """Matplotlib's file as an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    kind = "wide" if wide else "narrow"
    opening = (
        f'<svg class="{kind}" role="img" aria-label="{html.escape(label)}" viewBox="{box[1]}">'
    )
    svg = opening + svg[svg.index(">") + 1 :]
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"(font: [\d.]+px) [^;\"]+", r"\1 var(--sans)", svg)
    svg = re.sub(r' (?:d|x|y|transform|points)="[^"]*"', _rounded, svg)
    svg = re.sub(r"<g clip-path=[^>]*>\s*(?:<use [^>]*/>\s*)+</g>", _styled_once, svg)
    # clip paths and markers have names by content, which several charts of a page may share
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)

    def layer(match: "re.Match[str]") -> str:
        tooltip = f"<title>{html.escape(titles[int(match[1])])}</title>" if wide else ""
        return f'<g data-layer="{match[1]}">{tooltip}'

    return re.sub(rf'<g id="{name}-layer-(\d+)">', layer, svg)


def _rounded(attribute: "re.Match[str]") -> str:
    """Places in tenths: of the 720 units that a page is wide, nobody sees less."""
    return re.sub(r"(\d\.\d)\d+", r"\1", attribute[0])


def _styled_once(match: "re.Match[str]") -> str:
    """Markers of one line, whose style is told once for all of them."""
    group = match[0]
    style = re.search(r'<use [^>]*style="([^"]*)"', group)
    if style is None:
        return group
    plain = re.sub(r'(<use [^>]*?) style="[^"]*"', r"\1", group)
    return plain.replace("<g ", f'<g style="{style[1]}" ', 1)
