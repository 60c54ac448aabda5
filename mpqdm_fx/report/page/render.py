"""From numbers and pictures to one self-contained HTML file."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpqdm_fx.records.config import MPQConfig
from mpqdm_fx.report.page import charts, text
from mpqdm_fx.report.page.cards import Card, cards_of, whole_of
from mpqdm_fx.report.page.details import BIT_AXIS, LayerRow, layer_rows
from mpqdm_fx.report.page.gallery import Gallery
from mpqdm_fx.report.page.noise_axis import from_noise
from mpqdm_fx.report.page.svg import Chart
from mpqdm_fx.report.record import ActivationNumbers, PartRecord, ReportRecord
from mpqdm_fx.report.words import word_of, word_of_sqnr, word_of_x0

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["PartView", "page_environment", "render_report", "setting_text"]

_TEMPLATES = Path(__file__).parent / "templates"
_MAIN = ("weight_bits", "activation_bits", "activation_mode", "allocation", "rounding", "levels")


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

    part: PartRecord
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
        parts=[_view(from_noise(part)) for part in record.parts],
        whole=whole_of(record),
        title=_title(record),
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
        "ratio": text.ratio_text,
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


def _title(record: ReportRecord) -> str:
    forms: dict[str, list[str]] = {}
    for part in record.parts:
        weights = text.bits_text(part.mean_bits)
        activations = part.settings.get("activation_bits")
        mode = part.settings.get("activation_mode")
        inputs = "float activations" if mode == "float" else f"{activations}-bit activations"
        forms.setdefault(f"{weights}-bit weights, {inputs}", []).append(part.name)
    for left in record.float_parts:
        forms.setdefault("float", []).append(left.name)
    if len(forms) == 1:
        return next(iter(forms))
    return " \N{MIDDLE DOT} ".join(f"{', '.join(names)}: {form}" for form, names in forms.items())


def _verdict(record: ReportRecord) -> str:
    """What the numbers say, in a sentence or two."""
    size = sum(part.shipped_bytes for part in record.all_parts)
    whole = sum(part.float32_bytes for part in record.all_parts)
    sentences = [f"{text.size_text(size, whole)}."] if size and whole else []
    for part in record.parts:
        if part.calls_per_step and part.epsilon_sqnr_db is not None:
            ratio = text.ratio_text(part.epsilon_sqnr_db)
            word = word_of_sqnr(part.epsilon_sqnr_db)
            sentences.append(f"Its noise prediction against float's: {word} ({ratio}).")
    pictures = record.pictures
    if pictures is not None and pictures.x0_sqnr_db is not None:
        ratio, word = text.ratio_text(pictures.x0_sqnr_db), word_of_x0(pictures.x0_sqnr_db)
        sentences.append(f"{pictures.count} whole runs from the same noise: {word} ({ratio}).")
    if pictures is not None and pictures.psnr_db is not None and pictures.ssim is not None:
        ratio, word = text.ratio_text(pictures.psnr_db), word_of("psnr", pictures.psnr_db)
        sentences.append(f"Their pictures: {word} (PSNR {ratio}, SSIM {pictures.ssim:.3f}).")
    return " ".join(sentences)


def _view(part: PartRecord) -> PartView:
    drawn = {
        chart.name.removeprefix(f"{part.name}-"): chart
        for chart in (
            charts.bits_chart(part),
            charts.bytes_chart(part),
            charts.levels_chart(part),
            charts.heat_chart(part),
            charts.solve_chart(part),
            charts.judged_chart(part),
        )
        if chart is not None
    }
    usual = MPQConfig().to_dict()
    settings = {
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
        settings=tuple((key, setting_text(value)) for key, value in settings.items()),
        defaults=tuple(
            (key, setting_text(value))
            for key, value in part.settings.items()
            if key not in settings
        ),
    )


def _inputs(choices: Sequence[ActivationNumbers]) -> tuple[tuple[str, str, str, str, str], ...]:
    ordered = sorted(choices, key=lambda choice: -choice.quantized_cost)
    return tuple(
        (
            choice.layers[0] + (f" and {len(choice.layers) - 1} more" if choice.layers[1:] else ""),
            _below(choice.quantized_cost),
            _below(choice.cost),
            f"{100 * choice.slowdown:+.1f} %" if choice.slowdown >= 5e-4 else "",
            choice.chosen,
        )
        for choice in ordered
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
        entries = {key: entry for key, entry in value.items() if entry not in (None, False)}
        return ", ".join(f"{key} {entry}" for key, entry in entries.items())
    return str(value)


def _file_rows(files: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name, f"{size:,}") for name, size in files.items()]


def _breakable(name: str) -> Any:
    """A layer's name that may be broken at its dots."""
    from markupsafe import Markup, escape

    return Markup("<wbr>.").join(escape(piece) for piece in name.split("."))
