"""The page as a person sees it: headless Chromium at a phone's width and at a desk's."""

import browser as chromium
import pytest
from page_checks import faults

from mpqdm_fx.jobs.compare import compare_folders

pytestmark = pytest.mark.skipif(
    bool(chromium.missing()), reason=f"{chromium.missing()} not installed"
)


@pytest.fixture(scope="module")
def session():
    with chromium.browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(three_bits, five_bits, tmp_path_factory):
    compared = tmp_path_factory.mktemp("compared") / "compare.html"
    compare_folders([three_bits, five_bits], compared, samples=2)
    return {"report": three_bits / "report.html", "compare": compared}


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("kind", ["report", "compare"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_chart_is_empty_and_no_text_overflows_or_hides(session, pages, kind, width, theme):
    assert faults(session, pages[kind], width=width, theme=theme) == []


def test_a_bar_opens_its_layer_and_rows_are_sorted(session, pages):
    session.open(pages["report"], width=1280, theme="light")
    session.run("document.querySelector('svg.wide [data-layer=\"2\"]').dispatchEvent("
                "new MouseEvent('click', {bubbles: true}))")  # fmt: skip
    assert session.run("return document.getElementById('unet-layer-2').open") is True
    session.run("document.querySelector('[data-sort=bytes]').click()")
    order = session.run(
        "return [...document.querySelectorAll('.layer-box')].map(d => Number(d.dataset.bytes))"
    )
    assert order == sorted(order)
    assert order[0] < order[-1]
