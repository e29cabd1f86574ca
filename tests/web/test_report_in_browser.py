"""The report in a browser without a network: drawn, narrow enough for a phone, readable in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.web.conftest import WIDTHS

CHARTS = 2 + 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_report(chromium: Any, report_page: Path, device: str, scheme: str) -> None:
    width, height = WIDTHS[device]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_offline(True)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(report_page.as_uri())
    page.wait_for_function(f"document.querySelectorAll('.main-svg .xtick').length >= {CHARTS}")
    assert complaints == []
    assert page.locator(".js-plotly-plot").count() == CHARTS
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator(".heatmaplayer image").count() == 2
    loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert page.evaluate(loaded)
    text = "getComputedStyle(document.querySelector('.xtick text')).fill"
    assert (page.evaluate(text) == "rgb(29, 33, 41)") == (scheme == "light")
    page.get_by_text("The numbers as a table").first.click()
    assert page.get_by_role("cell", name="stem").first.is_visible()
    context.close()
