"""The page of an export as a person sees it: headless Chromium at a phone's width and a desk's."""

import browser as chromium
import pytest
from page_checks import faults

pytestmark = [
    pytest.mark.xnnpack,
    pytest.mark.skipif(bool(chromium.missing()), reason=f"{chromium.missing()} not installed"),
]


def test_no_chart_is_empty_and_no_text_overflows_or_hides(exported):
    page = exported[1].directory / "report.html"
    with chromium.browser() as session:
        for width in (390, 1280):
            for theme in ("light", "dark"):
                assert faults(session, page, width=width, theme=theme) == [], (width, theme)
        session.run("document.querySelector('[data-part=vae_decoder] svg.wide [data-layer=\"1\"]')"
                    ".dispatchEvent(new MouseEvent('click', {bubbles: true}))")  # fmt: skip
        opened = session.run("return [...document.querySelectorAll('.layer-box')]"
                             ".filter(d => d.open).map(d => d.id)")  # fmt: skip
    assert "vae_decoder-layer-1" in opened
