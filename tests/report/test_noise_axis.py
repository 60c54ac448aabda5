"""Charts along a run go from noise to picture, whichever of them a model is told."""

import json

import pytest
from pages import read_page

from mpqdm_fx.calibration.conventions import CONVENTIONS
from mpqdm_fx.graph.noise_names import NOISE_NAMES, TIMESTEP_NAMES
from mpqdm_fx.io.schema import validated
from mpqdm_fx.report.page.compare import render_compare
from mpqdm_fx.report.page.noise_axis import told_of
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.record import ReportRecord

RUN = "from noise (left) to picture (right)"


@pytest.fixture(scope="module")
def record(three_bits):
    content = json.loads((three_bits / "report.json").read_text(encoding="utf-8"))
    return validated(ReportRecord, content, "report.json")


def told(record, model_class, argument):
    """The record of a model of a class that is told its noise levels by an argument."""
    part = record.parts[0].model_copy(
        update={"model_class": model_class, "noise_argument": argument}
    )
    return record.model_copy(update={"parts": (part,)})


def figure(page, name):
    return next(found for found in page.all("figure") if found.attributes.get("id") == name)


def drawn_levels(html):
    """Labels of the axis, ratios from left to right, and rows of the table, of the chart."""
    levels = figure(read_page(html), "unet-levels")
    words = [text.text for text in levels.all("svg")[0].all("text")]
    rows = [[cell.text for cell in row.all("th")] for row in levels.all("tr")[1:]]
    return words, [row[0] for row in rows]


CASES = [
    ("UNet2DModel", "timestep", False, RUN),
    ("ZImageDenoiser", "t", True, RUN),
    ("Net", "log_snr", True, RUN),
    ("Net", "sigma", False, RUN),
    ("Net", "t", False, "from large (left) to small (right)"),
]


@pytest.mark.parametrize(("model_class", "argument", "turned", "label"), CASES)
def test_the_left_end_is_noise_where_it_is_known(record, model_class, argument, turned, label):
    words, rows = drawn_levels(render_report(told(record, model_class, argument), None))
    points = record.parts[0].levels[:: -1 if turned else 1]
    ratios = [f"{point.sqnr_db:.1f}" for point in points]
    assert [word for word in words if word in ratios] == ratios
    assert rows == [f"{point.level:g}" for point in points]
    assert f"{argument}: {label}" in words


@pytest.mark.parametrize(("model_class", "argument", "turned", "label"), CASES)
def test_layers_are_drawn_in_the_same_order(record, model_class, argument, turned, label):
    page = read_page(render_report(told(record, model_class, argument), None))
    first, last = (f"{point.level:.4g}" for point in record.parts[0].levels[:: 1 - 2 * turned][::7])
    named = [svg.attributes.get("aria-label", "") for svg in page.all("svg")]
    assert any(f"dB by noise level, {first} to {last}: " in name for name in named)
    layer = next(la for la in record.parts[0].layers if la.by_level)
    ratios = [f"{value:.1f}" for value in layer.by_level][:: -1 if turned else 1]
    rows = [[c.text for c in row.all("td")] for row in figure(page, "unet-heat").all("tr")[1:]]
    assert ratios in rows


def test_of_several_folders_too(record):
    for model_class, argument, turned, label in CASES:
        other = told(record, model_class, argument)
        page = read_page(render_compare(["a", "b"], [other, other], None, x0_sqnr_db=None))
        svg = figure(page, "levels").all("svg")[0]
        words = [text.text for text in svg.all("text")]
        assert f"{argument}: {label}" in words
        places = {text.text: float(text.attributes["x"]) for text in svg.all("text")}
        assert (places["200"] < places["400"]) is turned


@pytest.mark.parametrize(
    ("model_class", "argument", "end"),
    [
        ("UNet2DModel", "timestep", "least noise"),
        ("ZImageDenoiser", "t", "most noise"),
        ("Net", "t", "smallest t"),
    ],
)
def test_the_first_group_of_levels_is_told_apart(record, model_class, argument, end):
    page = read_page(render_report(told(record, model_class, argument), None))
    words = [text.text for text in figure(page, "unet-judged").all("svg")[0].all("text")]
    assert f"group of noise levels, 1 has the {end}" in words


def test_every_name_but_a_bare_time_says_what_it_tells(record):
    unknown = {
        name
        for name in NOISE_NAMES | TIMESTEP_NAMES
        if told_of(told(record, "Net", name).parts[0]) is None
    }
    assert unknown == {"t", "time", "times"}
    turned = {
        name
        for name, convention in CONVENTIONS.items()
        if told_of(told(record, name, convention.timestep).parts[0]) == "cleanness"
    }
    assert turned == {"ZImageDenoiser", "ZImageTransformer2DModel"}
