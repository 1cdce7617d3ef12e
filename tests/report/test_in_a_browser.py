"""The page in a real browser, as wide as a desk and as narrow as a phone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitron_nemo.stages.report import run
from support.chromium import chromium, show, why_no_chromium
from support.report_runs import report_of, write_measured_run


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_no_chromium():
        if os.environ.get("CI", "").lower() in ("true", "1"):
            pytest.fail(f"no browser: {reason}")
        pytest.skip(f"no browser: {reason}")
    return run(report_of(write_measured_run(tmp_path_factory.mktemp("run")))).path / "report.html"


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_fits_the_window_and_asks_for_nothing(page: Path, tmp_path: Path, width: int) -> None:
    shown = show(page, tmp_path, width)

    assert shown.window_width == width
    assert shown.page_width == width  # what is wider scrolls inside the page
    assert shown.requests == [] and shown.broken_images == 0


def test_a_page_that_is_too_wide_or_asks_for_a_file_is_told(page: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    asks = '<div style="width:700px">wide</div><img src="gone.png"><img src="http://elsewhere.example/far.png">'
    wide.write_text(page.read_text().replace("</body>", f"{asks}</body>"))
    shown = show(wide, tmp_path, 390)

    assert shown.page_width > 390 and shown.broken_images == 2
    assert sorted(shown.requests) == ["/far.png", "/gone.png"]


def test_a_browser_shows_what_is_written(page: Path, tmp_path: Path) -> None:
    text = chromium("--dump-dom", address=f"file://{page.resolve()}", profile=tmp_path)

    assert "In a minute" in text and "keeps 90% of the teacher at" in text
