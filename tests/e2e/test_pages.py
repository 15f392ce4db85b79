"""Reports in a real browser: nothing is fetched, nothing complains, nothing reaches off a phone's screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.report import html
from launcher.runs.account import account
from launcher.runs.run import Reader, RunHistory
from tests.e2e.browser import Browser, NotToBeHad, browser
from tests.fakes.journeys import LEGS, Leg, journey, write_journey
from tests.fakes.runs import attempt_events, write_events
from trainer.bucket import open_run

PHONE, DESK = 360, 1280
"""Pixels."""
LONG = "zephyr-7b-dpo-full-with-a-name-that-nobody-would-want-to-type-twice-8f3a2c"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    try:
        with browser(tmp_path_factory.mktemp("chromium")) as found:
            yield found
    except NotToBeHad as error:
        pytest.skip(f"no Chromium: {error}")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a run over three clouds, of one on this machine, of one that never took a step, and of two."""
    bucket, folder = tmp_path_factory.mktemp("bucket"), tmp_path_factory.mktemp("pages")
    write_journey(bucket / LONG, journey())
    write_journey(bucket / "direct", journey((Leg("lambda/us-east-1", "on demand", 22.32, 478, "done"),)))
    write_journey(
        bucket / "at-work", journey((*LEGS[:2], LEGS[2]._replace(end=None, usd_per_h=None, boot_s=240)))
    )
    write_events(bucket / "plain", attempt_events(1, start=0, last=30, total_steps=40))
    write_events(bucket / "no-step", attempt_events(1, start=0, last=0, total_steps=40))
    runs = {name: read(bucket, name) for name in (LONG, "direct", "at-work", "plain", "no-step")}
    texts = {name: html.run_page(run, account(run), made="now") for name, run in runs.items()}
    two = (runs[LONG], runs["direct"])
    texts["two"] = html.comparison_page(two, (account(two[0]), account(two[1])), made="now")
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in texts}


def read(bucket: Path, name: str) -> RunHistory:
    return Reader(open_run(str(bucket), name), name).read()


@pytest.mark.parametrize("name", [LONG, "at-work", "plain", "no-step", "two"])
def test_a_page_opens_on_a_phone_and_on_a_desk(chromium: Browser, pages: dict[str, Path], name: str) -> None:
    """It fits the width, needs no other file, and the console stays silent."""
    phone, desk = chromium.open(pages[name], PHONE, DESK)
    for seen, width in ((phone, PHONE), (desk, DESK)):
        assert (seen.complaints, seen.asked_for, seen.wide, seen.cut) == ([], [], [], [])
        assert seen.scroll_px <= width
        assert seen.headings == 1
    if name == LONG:  # each picture is shown once: two curves, the timeline, the paid time, GPU and host
        assert phone.shown == desk.shown == 6


def test_the_browser_would_have_told(chromium: Browser, tmp_path: Path) -> None:
    """A page that throws, fetches and is too wide is found out."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<div style="width:500px">wide</div><img src="no.png"><script>throw Error("oh")</script>'
        '<table><tr><th style="width:20px;max-width:20px;overflow-wrap:anywhere">planned</th></tr></table>'
        '<div class="value" style="width:20px;white-space:nowrap">12 min 34 s</div>'
    )
    [seen] = chromium.open(bad, PHONE)
    assert seen.scroll_px > 360
    assert seen.wide
    assert any("oh" in line for line in seen.complaints)
    assert seen.asked_for == ["/no.png"]
    assert seen.cut == ["planned", "12 min 34 s"]


def test_dark_is_dark_and_light_is_light(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """As the reader's system prefers it."""
    from PIL import Image, ImageStat

    brightness = {}
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        chromium.screenshot(pages[LONG], picture, dark=dark)
        with Image.open(picture) as image:
            brightness[dark] = ImageStat.Stat(image.convert("L")).mean[0]
    assert brightness[False] > 200
    assert brightness[True] < 70


def test_a_page_can_be_printed(chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """As PDF of a few sheets."""
    chromium.print(pages[LONG], tmp_path / "report.pdf")
    data = (tmp_path / "report.pdf").read_bytes()
    assert data.startswith(b"%PDF")
    assert len(data) > 20_000  # more than an empty sheet
