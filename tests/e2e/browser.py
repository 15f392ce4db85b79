"""A headless Chromium: this machine's, else Debian's, installed where the rest of the machine does not see it."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.lab.namespace import Namespace, NotToBeHad
from tests.e2e.lab.packages import install

NAMES = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = {"chromium": "chromium", "fc-list": "fontconfig"}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=10000",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
FRAMES = """<!DOCTYPE html><html><body style="margin:0">{frames}<pre id="seen"></pre><script>
const seen = frame => {{
  const doc = frame.contentDocument, width = frame.clientWidth;
  const wide = [...doc.body.querySelectorAll("*")].filter(each => {{
    const box = each.getBoundingClientRect();
    return box.width && (box.right > width + 1 || box.left < -1) && getComputedStyle(each).position !== "absolute";
  }}).map(each => each.tagName + "." + (each.getAttribute("class") || "") + " " + each.textContent.slice(0, 30));
  const lines = (node, from, to) => {{
    const range = doc.createRange();
    range.setStart(node, from); range.setEnd(node, to);
    return new Set([...range.getClientRects()].map(each => Math.round(each.top))).size;
  }};
  const shown = each => getComputedStyle(each.closest("thead") || each).position !== "absolute";
  const broken = [...doc.querySelectorAll("th, td.n")].filter(shown).flatMap(each => [...each.childNodes])
    .filter(each => each.nodeType === 3).flatMap(each => [...each.data.matchAll(/\\S+/g)]
    .filter(word => word[0].length < 16 && lines(each, word.index, word.index + word[0].length) > 1));
  const cut = [...doc.querySelectorAll(".value")].filter(each => each.scrollWidth > each.clientWidth);
  return {{
    scroll_px: doc.documentElement.scrollWidth, wide: wide.slice(0, 8),
    cut: [...broken.map(each => each[0]), ...cut.map(each => each.textContent)], headings: doc.querySelectorAll("h1").length,
    shown: [...doc.querySelectorAll("svg.chart")].filter(each => each.getBoundingClientRect().width).length,
  }};
}};
addEventListener("load", () => {{
  document.getElementById("seen").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(seen));
}});</script></body></html>"""
"""Measures a page in frames: a window of Chromium's cannot be as narrow as a phone."""
ONE_FRAME = '<iframe src="{page}" style="border:0;width:{width}px;height:3000px"></iframe>'


class Seen(NamedTuple):
    """A page that was opened at one width."""

    scroll_px: int
    """Width that it takes in all."""
    wide: list[str]
    """Elements that reach beyond the frame."""
    cut: list[str]
    """Words of tables that are broken in two, and figures that reach beyond their tiles."""
    headings: int
    shown: int
    """Pictures that are not hidden."""
    complaints: list[str]
    """What the console has shown, at any of the widths."""
    asked_for: list[str]
    """Paths that were fetched beside the page itself, at any of the widths."""


class Browser:
    """Opens pages; `run` runs Chromium with words of its command line."""

    def __init__(self, run: Callable[..., subprocess.CompletedProcess[str]], name: str, folder: Path) -> None:
        self._run = run
        self._name = name
        self._folder = folder

    def open(self, page: Path, *widths: int) -> list[Seen]:
        """A page in frames that are so many pixels wide."""
        frame = page.with_name("frame.html")
        frames = "".join(ONE_FRAME.format(page=page.name, width=width) for width in widths)
        frame.write_text(FRAMES.format(frames=frames))
        with served(page.parent) as (address, paths):
            done = self._start("--dump-dom", f"{address}/{frame.name}")
        found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
        told: list[dict[str, Any]] = json.loads(unescape(found[1]))
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        others = sorted(set(paths) - {f"/{page.name}", f"/{frame.name}", "/favicon.ico"})
        return [Seen(**each, complaints=complaints, asked_for=others) for each in told]

    def screenshot(self, page: Path, into: Path, *, dark: bool = False) -> None:
        words = [DARK] if dark else []
        self._start(*words, "--window-size=1040,1600", f"--screenshot={into}", page.as_uri())

    def print(self, page: Path, into: Path) -> None:
        """As PDF."""
        self._start(f"--print-to-pdf={into}", page.as_uri())

    def _start(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self._run(self._name, *FLAGS, f"--user-data-dir={self._folder}", *words)


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder over HTTP on this machine: its address, and the paths that are asked for."""
    paths: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form: str, *args: Any) -> None:
            paths.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Raises NotToBeHad."""
    if name := next(filter(shutil.which, NAMES), None):
        yield Browser(_here, name, folder)
        return
    with ExitStack() as stack:
        inside = stack.enter_context(Namespace(os.environ))
        install(inside, PACKAGES)
        yield Browser(inside.run, "chromium", folder)


def _here(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=120, stdin=subprocess.DEVNULL
    )


__all__ = ["Browser", "NotToBeHad", "Seen", "browser"]
