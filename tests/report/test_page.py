"""The page as a file: whole, self-contained, and with words for every drawing."""

import base64
import io
import json
import math
import re

import pytest
import torch
from pages import marks, read_page
from PIL import Image

from mpqdm_fx.io.schema import validated
from mpqdm_fx.report.page.cards import cards_of
from mpqdm_fx.report.page.details import layer_rows
from mpqdm_fx.report.page.gallery import gallery_of
from mpqdm_fx.report.page.render import render_report
from mpqdm_fx.report.page.text import TIMES, bytes_text
from mpqdm_fx.report.record import FloatPart, ProgramNumbers, ReportRecord, Spread


@pytest.fixture(scope="module")
def html(three_bits):
    return (three_bits / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return read_page(html)


@pytest.fixture(scope="module")
def numbers(three_bits):
    return json.loads((three_bits / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record(numbers):
    return validated(ReportRecord, numbers, "report.json")


def every_number(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for entry in value for number in every_number(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_the_page_is_small_and_loads_nothing_from_elsewhere(html, page):
    assert len(html.encode()) < 5_000_000
    addresses = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"')\s>]+)""", html)
    assert addresses
    assert {a for a in addresses if not a.startswith(("data:", "#"))} == set()
    for tag in ("link", "iframe", "object"):
        assert page.all(tag) == []
    assert [script.attributes for script in page.all("script")] == [{}]
    assert "@import" not in html
    assert "http" not in html


def test_every_drawing_has_marks_a_role_and_words(page):
    drawings = [svg for svg in page.all("svg") if "aria-hidden" not in svg.attributes]
    assert len(drawings) > 20
    for drawing in drawings:
        assert drawing.attributes["role"] == "img"
        assert len(drawing.attributes["aria-label"]) > 5
        assert marks(drawing) > 0, drawing.attributes["aria-label"]
    assert all(picture.attributes["alt"] for picture in page.all("img"))


def test_every_chart_is_there_for_both_screens_with_a_title_axes_and_its_numbers(page):
    charts = [
        element for element in page.all("figure") if element.attributes.get("class") == "chart"
    ]
    assert {chart.attributes["id"] for chart in charts} >= {
        "unet-bits", "unet-bytes", "unet-levels", "unet-heat", "unet-solve", "unet-judged",
    }  # fmt: skip
    for chart in charts:
        assert chart.all("h3")[0].text
        assert [svg.attributes["class"] for svg in chart.all("svg")] == ["wide", "narrow"]
        assert len(chart.all("table")) == 1
        for svg in chart.all("svg"):
            assert "axes_1" in " ".join(g.attributes.get("id", "") for g in svg.all("g"))
            words = [text.text for text in svg.all("text")]
            assert any(re.search(r"dB|bits|MB|kB", word) for word in words), "no unit"


def test_a_chart_says_the_same_numbers_as_its_words_and_its_table(page, record):
    part = record.parts[0]
    levels, sizes = (
        next(element for element in page.all("figure") if element.attributes.get("id") == name)
        for name in ("unet-levels", "unet-bytes")
    )
    for svg in sizes.all("svg"):
        assert bytes_text(part.stored_bytes) in [text.text for text in svg.all("text")]
    ratios = [f"{point.sqnr_db:.1f}" for point in part.levels]
    assert [text.text for text in levels.all("svg")[0].all("text") if text.text in ratios] == ratios
    rows = [[cell.text for cell in row.all("td")] for row in levels.all("tr")[1:]]
    assert rows == [[ratio, ratio] for ratio in ratios]


def test_a_page_of_a_large_model_stays_small(record):
    layer, picture = record.parts[0].layers[0], torch.rand(16, 3, 512, 512) * 2 - 1
    name = "up_blocks.1.attentions.2.transformer_blocks.9.attn2.to_out.0"
    spread = Spread(smallest=1.2345, lower=2.3456, middle=3.4567, upper=4.5678, largest=50.678)
    large = layer.model_copy(
        update={"name": name, "bits": {"2": 100, "3": 200, "4": 300}, "sensitivity": spread}
    )
    part = record.parts[0].model_copy(update={"layers": (large,) * 750})  # of Stable Diffusion XL
    several = record.model_copy(update={"parts": (part,)})
    gallery = gallery_of({"float": picture, "quantized": -picture}, labels=(), note="")
    assert len(render_report(several, gallery).encode()) < 5_000_000


@pytest.mark.parametrize("ratio", [math.inf, -math.inf, math.nan])
def test_a_page_of_ratios_that_are_no_number_is_still_a_page(record, ratio):
    part = record.parts[0]
    layers = tuple(
        layer.model_copy(
            update={
                "sqnr_db": ratio,
                "base_sqnr_db": ratio,
                "by_level": (ratio,) * len(part.levels),
            }
        )
        for layer in part.layers
    )
    levels = tuple(
        level.model_copy(update={"sqnr_db": ratio, "backend_sqnr_db": ratio})
        for level in part.levels
    )
    judged = tuple(score.model_copy(update={"sqnr_db": ratio}) for score in part.judged)
    odd = part.model_copy(
        update={
            "layers": layers,
            "levels": levels,
            "judged": judged,
            "epsilon_sqnr_db": ratio,
            "backend_epsilon_sqnr_db": ratio,
        }
    )
    page = read_page(render_report(record.model_copy(update={"parts": (odd,)}), None))
    assert len(page.all("svg")) > 20


def test_colours_are_the_pages_own_so_that_both_themes_are_right(html):
    assert "#0101" not in html
    assert "prefers-color-scheme: dark" in html
    used = set(re.findall(r"var\((--[\w-]+)", html))
    assert used - set(re.findall(r"(--[\w-]+):", html)) == set()


def test_names_inside_drawings_are_no_others_twice(html):
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    links = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    assert {href or url for href, url in links} <= set(names)


def test_every_number_of_the_record_is_finite_and_known_or_explained(numbers, record):
    values = every_number(numbers)
    assert len(values) > 100
    assert all(math.isfinite(number) for number in values)
    part = record.parts[0]
    assert part.milliseconds is not None
    assert part.backend_epsilon_sqnr_db == part.epsilon_sqnr_db
    assert part.program is None
    assert part.missing["delegation"] == "there is no program: the folder was made for packed"
    assert part.missing["sensitivity"] == 'allocation="uniform" measures none'
    assert sum(entry.bytes for entry in part.layers) == sum(
        getattr(part.bytes, kind) for kind in ("codes", "scales", "tables", "widths")
    )
    assert all(sum(layer.bits.values()) == layer.shape[0] for layer in part.layers)


def test_what_is_missing_is_said_on_the_page_and_no_zero_stands_there(page, record):
    text = page.text
    for sentence in record.parts[0].missing.values():
        assert sentence.lower().rstrip(".") in text.lower()
    assert "XNNPACK subgraph" not in text


def test_the_command_of_the_page_is_that_of_the_record(page, record, three_bits):
    (command,) = [
        element for element in page.all("code") if element.attributes.get("id") == "unet-command"
    ]
    assert command.text == record.command
    assert record.command.startswith("mpqdm-fx quantize ")
    assert record.command.endswith(f"--output {three_bits}")


def test_a_page_without_float_model_draws_no_chart_of_errors_and_says_why(record):
    why = "the float model is gone"
    part = record.parts[0].model_copy(
        update={
            "levels": (), "missing": {"levels": why, "kurtosis": why}, "judged": (),
            "layers": tuple(
                layer.model_copy(update={"by_level": None, "kurtosis": None, "sqnr_db": None})
                for layer in record.parts[0].layers
            ),
        }
    )  # fmt: skip
    bare = record.model_copy(
        update={"parts": (part,), "pictures": None, "missing": {"gallery": why, "float": why}}
    )
    page = read_page(render_report(bare, None))
    charts = {
        element.attributes["id"] for element in page.all("figure") if "id" in element.attributes
    }
    assert charts == {"unet-bits", "unet-bytes"}
    assert page.text.lower().count(why) >= 3
    assert page.all("img") == []


@pytest.fixture
def left_in_float(record):
    """A part that runs once per image, as an export leaves it when rounding costs too much."""
    (part,) = record.parts
    program = ProgramNumbers(
        file="vae_decoder.pte", bytes=9000, weights_bytes=0, subgraphs=1, delegated=9,
        undelegated=2, outside={"view_copy": 2}, float_layers={}, eight_bit_layers={},
        four_bit_layers=(), sqnr_db=99.0, max_lsb=None, seconds=1.0,
    )  # fmt: skip
    return FloatPart(
        **{name: getattr(part, name) for name in ("threads", "peak_bytes", "float_peak_bytes")},
        name="vae_decoder", model_class="ImageDecoder", float32_bytes=8000,
        files={"vae_decoder.pte.xz": 7000, "log.txt": 1}, milliseconds=1.0, float_milliseconds=2.0,
        program=program, missing={}, calls_per_step=0, quantized_sqnr_db=21.0,
        why="its output has 21.0 dB, less than 30",
    )  # fmt: skip


def test_a_part_that_stayed_in_float_is_told_with_its_reason_and_costs(record, left_in_float):
    mixed = record.model_copy(update={"float_parts": (left_in_float,)})
    html = render_report(mixed, None)
    page = read_page(html)
    (section,) = [
        element
        for element in page.all("section")
        if element.attributes.get("id") == "vae_decoder-float"
    ]
    for phrase in (
        "its output has 21.0 dB, less than 30",
        "7.00 kB",
        "a call, batch 1",
        "view_copy",
    ):
        assert phrase in section.text
    assert "float32_bytes" not in section.text
    assert "vae_decoder: float" in page.text
    shipped = mixed.parts[0].shipped_bytes + 7000
    (cards, *_) = [
        element for element in page.all("section") if element.attributes.get("class") == "cards"
    ]
    assert bytes_text(shipped).partition(" ")[0] in cards.text
    (parts,) = [
        element for element in page.all("section") if element.attributes.get("id") == "parts"
    ]
    assert [row.all("th")[0].text for row in parts.all("tr")[1:]] == ["unet", "vae_decoder"]
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    assert set(re.findall(r'<a href="#([^"]+)"', html)) <= set(names)


def test_a_page_of_float_programs_alone_says_so(record, left_in_float):
    denoiser = left_in_float.model_copy(update={"name": "denoiser", "calls_per_step": 2})
    bare = record.model_copy(update={"parts": (), "float_parts": (denoiser, left_in_float)})
    page = read_page(render_report(bare, None))
    (title,) = [element for element in page.all("p") if element.attributes.get("class") == "title"]
    assert title.text == "float"
    assert "the denoiser was not quantized" in page.text
    assert "2 calls" in page.text


def test_what_is_larger_than_float_is_not_called_smaller(record, left_in_float):
    larger = left_in_float.model_copy(update={"files": {"vae_decoder.pte": 16_000}})
    bare = record.model_copy(update={"parts": (), "float_parts": (larger,)})
    page = read_page(render_report(bare, None))
    assert page.text.count(f"2.0{TIMES} larger than float32") == 2  # in a sentence and on a card
    assert "smaller" not in page.text


def test_an_exact_program_has_no_unit(record, left_in_float):
    exact = left_in_float.program.model_copy(update={"sqnr_db": math.inf})
    left = left_in_float.model_copy(update={"program": exact})
    page = read_page(render_report(record.model_copy(update={"float_parts": (left,)}), None))
    assert "Program against the converted graph: exact." in page.text


def test_what_runs_once_per_image_predicts_no_noise(record):
    (part,) = record.parts
    once = part.model_copy(update={"name": "vae_decoder", "calls_per_step": 0})
    names = [card.name for card in cards_of(once)]
    assert names[1:4] == ["Time a call", "Peak memory", "Output SQNR"]
    assert [card.name for card in cards_of(part)][3] == "Noise SQNR"


def test_a_page_of_several_parts_has_all_of_each_and_no_name_twice(record):
    (part,) = record.parts
    pair = record.model_copy(update={"parts": (part, part.model_copy(update={"name": "vae"}))})
    html = render_report(pair, None)
    names = re.findall(r'\bid="([^"]+)"', html)
    assert len(names) == len(set(names))
    assert {"unet-heat", "vae-heat", "unet-layer-0", "vae-layer-0"} <= set(names)
    links = re.findall(r'<a href="#([^"]+)"', html)
    assert set(links) <= set(names)
    read_page(html)


def test_pictures_of_nan_differ_from_all_others_in_the_gallery():
    sound = torch.zeros(1, 1, 4, 4)
    gallery = gallery_of({"float": sound, "quantized": sound * math.nan}, labels=(), note="")
    difference = gallery.rows[-1].pictures[0].partition("base64,")[2]
    shown = Image.open(io.BytesIO(base64.b64decode(difference)))
    assert shown.getextrema() == (255, 255)  # black is no difference


@pytest.mark.parametrize(
    ("ratio", "word"), [(math.inf, "exact"), (-math.inf, "no number"), (math.nan, "no number")]
)
def test_only_an_infinite_ratio_is_exact(record, ratio, word):
    part = record.parts[0]
    layer = part.layers[0].model_copy(update={"by_level": (ratio,) * len(part.levels)})
    (row,) = layer_rows(part.model_copy(update={"layers": (layer,)}))
    drawings = dict(row.drawings)
    assert f'aria-label="{word} at every noise level"' in drawings["SQNR by noise level, dB"]
    quality = part.model_copy(update={"epsilon_sqnr_db": ratio, "backend_epsilon_sqnr_db": ratio})
    card = next(card for card in cards_of(quality) if "SQNR" in card.name)
    assert (card.unit == "") is (word == "exact")
    assert card.good is (word == "exact")
