"""From numbers and pictures to one self-contained HTML file."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqdm_fx.config import MPQConfig
from mpqdm_fx.report.page import charts, text
from mpqdm_fx.report.page.details import BIT_AXIS, LayerRow, layer_rows
from mpqdm_fx.report.page.gallery import Gallery
from mpqdm_fx.report.page.svg import Chart
from mpqdm_fx.report.record import ActivationNumbers, Part, ReportRecord
from mpqdm_fx.report.words import word_of_sqnr, word_of_x0

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["Card", "PartView", "cards_of", "page_environment", "render_report", "setting_text"]

_TEMPLATES = Path(__file__).parent / "templates"
_MAIN = ("weight_bits", "activation_bits", "activation_mode", "allocation", "rounding", "levels")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One of the numbers on the first screen.

    Attributes:
        name: What it is.
        value: The number.
        unit: Behind it.
        told: What it is to be compared with.
        good: Whether it is what one would wish; None if that cannot be said.
    """

    name: str
    value: str
    unit: str = ""
    told: str = ""
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class PartView:
    """A part as the page shows it.

    Attributes:
        part: Its numbers.
        cards: The first screen.
        charts: By name.
        layers: Rows of the table of layers.
        inputs: Rows of the table of inputs, the dearest first.
        settings: Settings that were chosen, and the main ones.
        defaults: All others.
    """

    part: Part
    cards: tuple[Card, ...]
    charts: dict[str, Chart]
    layers: tuple[LayerRow, ...]
    inputs: tuple[tuple[str, str, str, str, str], ...]
    settings: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, str], ...]


def render_report(record: ReportRecord, gallery: Gallery | None) -> str:
    """The page of a report.

    Args:
        record: Its numbers.
        gallery: Its pictures; None where there are none, which `record.missing` explains.

    Returns:
        HTML that loads nothing from elsewhere.
    """
    page = page_environment().get_template("report.html.j2")
    return page.render(
        record=record,
        gallery=gallery,
        parts=[_view(part) for part in record.parts],
        title=_title(record.parts),
        verdict=_verdict(record),
    )


@functools.cache
def page_environment() -> "Environment":
    """Templates of this package, with what they format numbers by."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bits": text.bits_text,
        "bytes": text.bytes_text,
        "db": text.db_text,
        "share": text.share_text,
        "last_part": lambda name: Path(name).name or name,
        "raw": Markup,
        "breakable": _breakable,
        "capitalize_first": lambda sentence: sentence[:1].upper() + sentence[1:].rstrip("."),
    }
    environment.globals["file_rows"] = _file_rows
    environment.globals["bit_axis"] = Markup(BIT_AXIS)
    for name in ("page.css", "page.js"):
        content = (_TEMPLATES / name).read_text(encoding="utf-8")
        environment.globals[name.replace(".", "_")] = Markup(content)
    return environment


def cards_of(part: Part) -> tuple[Card, ...]:
    """The five numbers that matter: size, time, memory, quality, whether the program is whole."""
    return (_size(part), _time(part), _memory(part), _quality(part), _whole(part))


def _size(part: Part) -> Card:
    size = part.shipped_bytes
    value, _, unit = text.bytes_text(size).partition(" ")
    times = text.times_text(part.float32_bytes / size) if size else ""
    return Card(
        name="Size" if part.program is None else "Program",
        value=value,
        unit=unit,
        told=f"{times} smaller than float32, {text.bytes_text(part.float32_bytes)}",
        good=size < part.float32_bytes,
    )


def _time(part: Part) -> Card:
    if part.milliseconds is None:
        return Card(name="Time a step", value=text.NONE, told="not measured")
    told = ""
    if part.float_milliseconds:
        told = f"eager float takes {part.float_milliseconds:.1f} ms; "
    return Card(
        name="Time a step",
        value=f"{part.milliseconds:.1f}",
        unit="ms",
        told=f"{told}batch 1, {part.threads} thread{'' if part.threads == 1 else 's'}",
        good=None
        if part.float_milliseconds is None or part.program is None
        else part.milliseconds <= part.float_milliseconds,
    )


def _memory(part: Part) -> Card:
    if part.peak_bytes is None:
        return Card(name="Peak memory", value=text.NONE, told="not measured")
    value, _, unit = text.bytes_text(part.peak_bytes).partition(" ")
    other = part.float_peak_bytes
    return Card(
        name="Peak memory",
        value=value,
        unit=unit,
        told="" if other is None else f"float takes {text.bytes_text(other)}; load and one step",
        good=None if other is None or part.program is None else part.peak_bytes <= other,
    )


def _quality(part: Part) -> Card:
    db = part.backend_epsilon_sqnr_db
    db = part.epsilon_sqnr_db if db is None else db
    if db is None:
        return Card(name="Noise SQNR", value=text.NONE, told="not measured")
    exact = math.isinf(db)
    return Card(
        name="Noise SQNR",
        value=text.db_text(db),
        unit="" if exact else "dB",
        told=f"{word_of_sqnr(db)}: predicted noise against float",
        good=db >= 20,
    )


def _whole(part: Part) -> Card:
    program = part.program
    if program is None:
        bits = text.bits_text(part.effective_bits)
        return Card(name="Bits a weight", value=bits, told="of all weights, all overhead counted")
    whole = program.undelegated <= 1 and program.subgraphs == 1
    outside = f"{program.undelegated} node{'' if program.undelegated == 1 else 's'} outside"
    return Card(
        name="One whole program",
        value="yes" if whole else "no",
        told=f"{program.subgraphs} XNNPACK subgraph{'' if program.subgraphs == 1 else 's'}, "
        f"{outside}",
        good=whole,
    )


def _title(parts: Sequence[Part]) -> str:
    told = []
    for part in parts:
        weights = text.bits_text(part.mean_bits)
        activations = part.settings.get("activation_bits")
        mode = part.settings.get("activation_mode")
        inputs = "float activations" if mode == "float" else f"{activations}-bit activations"
        told.append(f"{weights}-bit weights, {inputs}")
    return " · ".join(dict.fromkeys(told))


def _verdict(record: ReportRecord) -> str:
    """What the numbers say, in a sentence or two."""
    sentences = []
    for part in record.parts:
        size = text.times_text(part.float32_bytes / part.shipped_bytes)
        sentences.append(f"{size} smaller than float32.")
        if part.epsilon_sqnr_db is not None:
            ratio = text.ratio_text(part.epsilon_sqnr_db)
            word = word_of_sqnr(part.epsilon_sqnr_db)
            sentences.append(f"Its noise prediction against float's: {word} ({ratio}).")
    pictures = record.pictures
    if pictures is not None and pictures.x0_sqnr_db is not None:
        ratio, word = text.ratio_text(pictures.x0_sqnr_db), word_of_x0(pictures.x0_sqnr_db)
        sentences.append(f"{pictures.count} whole runs from the same noise: {word} ({ratio}).")
    return " ".join(sentences)


def _view(part: Part) -> PartView:
    drawn = {
        one.name.removeprefix(f"{part.name}-"): one
        for one in (
            charts.bits_chart(part),
            charts.bytes_chart(part),
            charts.levels_chart(part),
            charts.heat_chart(part),
            charts.solve_chart(part),
            charts.judged_chart(part),
        )
        if one is not None
    }
    usual = MPQConfig().to_dict()
    told = {
        key: value
        for key, value in part.settings.items()
        if key in _MAIN or value != usual.get(key)
    }
    return PartView(
        part=part,
        cards=cards_of(part),
        charts=drawn,
        layers=tuple(layer_rows(part)),
        inputs=_inputs(part.activations),
        settings=tuple((key, setting_text(value)) for key, value in told.items()),
        defaults=tuple(
            (key, setting_text(value)) for key, value in part.settings.items() if key not in told
        ),
    )


def _inputs(every: Sequence[ActivationNumbers]) -> tuple[tuple[str, str, str, str, str], ...]:
    ordered = sorted(every, key=lambda one: -one.quantized_cost)
    return tuple(
        (
            one.layers[0] + (f" and {len(one.layers) - 1} more" if one.layers[1:] else ""),
            _below(one.quantized_cost),
            _below(one.cost),
            f"{100 * one.slowdown:+.1f} %" if one.slowdown >= 5e-4 else "",
            one.chosen,
        )
        for one in ordered
    )


def _below(share: float) -> str:
    """A share of the output's energy, in dB below it."""
    return f"{-10 * math.log10(share):.1f}" if share > 0 else "none"


def setting_text(value: Any) -> str:
    """A setting's value in words."""
    if value is None:
        return text.NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return "; ".join(map(setting_text, value)) or "none"
    if isinstance(value, dict):
        given = {key: entry for key, entry in value.items() if entry not in (None, False)}
        return ", ".join(f"{key} {entry}" for key, entry in given.items())
    return str(value)


def _file_rows(files: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, f"{size:,}") for name, size in files.items()]


def _breakable(name: str) -> Any:
    """A layer's name that may be broken at its dots."""
    from markupsafe import Markup, escape

    return Markup("<wbr>.").join(escape(piece) for piece in name.split("."))
