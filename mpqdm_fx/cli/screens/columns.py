"""Tables whose numbers are never cut: names are folded, and what matters least is left out."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

__all__ = ["Column", "Columns", "fold", "unbroken"]

_GAP = "  "
_LEAST = {"name": 30, "text": 16}  # columns that these may be folded or wrapped to


def fold(name: str, width: int) -> str:
    """Shorten a dotted name in the middle: `down_blocks.0…to_q`.

    Args:
        name: A name.
        width: Columns that it may take, at least 3.
    """
    if cell_len(name) <= width:
        return name
    return _at_whole_parts(name, width) or _anywhere(name, width)


def _at_whole_parts(name: str, width: int) -> str | None:
    """The fold that leaves out whole parts of a name; None if little would be left."""
    parts = name.split(".")
    best, most = None, 0.6 * width
    for first in range(1, len(parts)):
        for last in range(first + 1, len(parts)):
            head, tail = ".".join(parts[:first]), ".".join(parts[last:])
            # the end tells layers apart: a beginning counts up to half of the room
            worth = min(cell_len(head), width / 2) + cell_len(tail)
            if cell_len(head) + 1 + cell_len(tail) <= width and worth > most:
                best, most = f"{head}…{tail}", worth
    return best


def _anywhere(name: str, width: int) -> str:
    for length in range(min(width, len(name)) - 1, 1, -1):
        head = max(1, length * 2 // 5)
        folded = f"{name[:head]}…{name[len(name) - length + head :]}"
        if cell_len(folded) <= width:
            return folded
    return "…"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        heading: Its heading.
        kind: `"name"` is folded in the middle, `"text"` is wrapped (in one column at most, the last
            one), `"number"` is printed as it is, on the right.
        spare: Order in which columns are left out where the terminal is too narrow; 0 for never.
        cells: What stands in it, by row.
    """

    heading: str
    kind: Literal["name", "number", "text"] = "number"
    spare: int = 0
    cells: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Columns of the terminal that it would like."""
        return max(map(cell_len, [self.heading, *self.cells]))

    @property
    def least(self) -> int:
        """Columns that it can do with."""
        least = _LEAST.get(self.kind, self.width)
        return min(self.width, max(least, cell_len(self.heading)))


class Columns:
    """A table for rich, laid out for the width that it is printed at.

    Args:
        title: Its title.
        columns: Its columns.
        note: What stands below.
    """

    def __init__(self, title: str, columns: Sequence[Column], note: str = "") -> None:
        self.title, self.columns, self.note = title, tuple(columns), note

    def add(self, *cells: str) -> None:
        """Add a row, with a cell for each column."""
        for column, cell in zip(self.columns, cells, strict=True):
            column.cells.append(cell)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out; yields lines."""
        shown = _fitting(self.columns, options.max_width)
        widths = _widths(shown, options.max_width)
        headings = [[column.heading] for column in shown]
        for text in (self.title, *_lines(shown, widths, headings)):
            yield unbroken(text, options, "bold")
        rule = "─" * min(options.max_width, sum(widths) + len(_GAP) * (len(widths) - 1))
        for text in (rule, *_body(shown, widths)):
            yield unbroken(text, options)
        if self.note:
            yield Text(self.note)
        yield Text("")

    def rows(self, width: int) -> Iterator[str]:
        """The lines below the headings, for a width."""
        shown = _fitting(self.columns, width)
        return _body(shown, _widths(shown, width))


_ASCII = str.maketrans("─…±", "-~+")


def unbroken(text: str, options: ConsoleOptions, style: str = "") -> Text:
    """A line that is printed as it is, in what the terminal's encoding has.

    Args:
        text: The line.
        options: Of the terminal.
        style: Its style.
    """
    shown = text.translate(_ASCII) if options.ascii_only else text
    return Text(shown, style=style, no_wrap=True, overflow="ignore")


def _body(columns: Sequence[Column], widths: Sequence[int]) -> Iterator[str]:
    for row in range(len(columns[0].cells)):
        cells = [
            _cell(column, column.cells[row], width)
            for column, width in zip(columns, widths, strict=True)
        ]
        yield from _lines(columns, widths, cells)


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns without those that are empty or for which there is no room."""
    shown = [c for c in columns if not c.spare or any(c.cells)]
    for spare in sorted((c for c in shown if c.spare), key=lambda column: column.spare):
        if sum(c.least for c in shown) + len(_GAP) * (len(shown) - 1) <= width:
            break
        shown.remove(spare)
    return shown


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Width of each column: what it would like, or less for names and text."""
    widths = [column.least for column in columns]
    left = width - sum(widths) - len(_GAP) * (len(widths) - 1)
    for kind in ("name", "text"):
        for index, column in enumerate(columns):
            if column.kind == kind:
                more = max(0, min(left, column.width - widths[index]))
                widths[index] += more
                left -= more
    return widths


def _cell(column: Column, text: str, width: int) -> list[str]:
    """Lines of a cell."""
    if column.kind == "name":
        return [fold(text, width)]
    return textwrap.wrap(text, width) or [""] if column.kind == "text" else [text]


def _lines(
    columns: Sequence[Column], widths: Sequence[int], cells: Sequence[Sequence[str]]
) -> Iterator[str]:
    for index in range(max(map(len, cells))):
        parts = []
        for column, width, lines in zip(columns, widths, cells, strict=True):
            text = lines[index] if index < len(lines) else ""
            blank = " " * max(0, width - cell_len(text))
            parts.append(blank + text if column.kind == "number" else text + blank)
        yield _GAP.join(parts).rstrip()
