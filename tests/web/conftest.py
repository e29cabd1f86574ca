"""Headless Chromium for pages. Debian's `chromium` package will do; without it these tests are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shared

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def report_page(shared: Shared, adaptive_bundle: Path) -> Path:
    """The report of the adaptive bundle, two prompts of it drawn, one of them hostile."""

    def make(folder: Path) -> None:
        from qlip_export.progress import Silent
        from qlip_export.report.collect import ReportOptions, collect
        from qlip_export.report.page import write_page

        folder.mkdir()
        (folder / "prompts.txt").write_text("a red apple\n</script><b>the blue boat & a dog</b>\na cat\n")
        data = collect(
            adaptive_bundle, ReportOptions(prompts=folder / "prompts.txt", images=2, seed=3), Silent()
        )
        write_page(data, folder / "report.html")

    return shared("report", make) / "report.html"
