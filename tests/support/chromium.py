"""A page as a browser shows it: Debian's chromium, without a window, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MEASURED = "<script>addEventListener('load', () => {const page = document.documentElement; \
document.title = `measured ${page.scrollWidth} ${innerWidth} ${[...document.images]\
.filter(each => !each.naturalWidth).length}`})</script>"


@dataclass(frozen=True)
class Shown:
    """What the page came to in a window of some width, in CSS pixels."""

    page_width: int
    window_width: int
    broken_images: int
    requests: list[str]
    """What it asked for, of whatever host."""


def why_no_chromium() -> str | None:
    return None if _browser() else f"none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)"


def _browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class _Listening(SimpleHTTPRequestHandler):
    """Serves the folder, and remembers what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


def show(page: Path, folder: Path, width: int) -> Shown:
    """Open a copy of the page that measures itself, in a frame of this width: a window is never narrower than 500.

    Every name of a host leads to a server of ours.
    """
    (folder / "copy.html").write_text(page.read_text().replace("</body>", f"{MEASURED}</body>"))
    (folder / "frame.html").write_text(
        f"<iframe src='copy.html' style='width:{width}px;height:800px;border:0' onload=\"setTimeout(() => "
        'document.body.append(document.querySelector(`iframe`).contentDocument.title))"></iframe>'
    )
    asked: list[str] = []
    handler = partial(type("_Handler", (_Listening,), {"asked": asked}), directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}"
        options = ["--virtual-time-budget=4000", f"--host-resolver-rules=MAP * {here}", "--dump-dom"]
        done = chromium(*options, address=f"http://{here}/frame.html", profile=folder / "profile")
        server.shutdown()
    measured = re.search(r"measured (\d+) (\d+) (\d+)", done)
    assert measured is not None, done[-2000:]
    ours = ("/frame.html", "/copy.html", "/favicon.ico")
    return Shown(*map(int, measured.groups()), [path for path in asked if path not in ours])


def chromium(*options: str, address: str, profile: Path) -> str:
    """Its standard output."""
    browser = _browser()
    assert browser is not None
    quiet = ["--disable-background-networking", "--disable-features=NetworkTimeServiceQuerying"]
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}", *quiet]
    command = [browser, *common, *options, address]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
