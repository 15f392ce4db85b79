"""The HTML report: escaped, self-contained, and readable without colour."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from launcher.report import bars, curves, html, tables
from launcher.report.curves import Curve, Panel, panels
from launcher.report.html import PATTERNS
from launcher.report.svg import moments, plain, tag, ticks
from launcher.runs.account import account
from launcher.runs.run import AttemptHistory, Reader, RunHistory
from tests.fakes.journeys import LEGS, journey, write_journey
from tests.fakes.runs import attempt_events, write_events
from trainer.bucket import open_run

CSS = files("launcher.report").joinpath("page.css").read_text()


class Checked(HTMLParser):
    """A parser that asserts that all tags are properly nested."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((name, dict(attrs)))
        if name not in ("meta", "link"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def run(tmp_path: Path) -> RunHistory:
    write_journey(tmp_path / "a-run", journey())
    return Reader(open_run(str(tmp_path), "a-run"), "a-run").read()


def checked(text: str) -> Checked:
    parser = Checked()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_a_page_is_one_file_without_scripts(run: RunHistory) -> None:
    """The page fetches nothing."""
    found = checked(html.run_page(run, account(run), made="now"))
    assert "script" not in [name for name, _ in found.tags]
    addresses = [
        value for _, attributes in found.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses == ["data:,"]
    assert not re.search(r"url\((?!#)|@import|https?:", CSS)


def test_messages_are_escaped(run: RunHistory) -> None:
    """Brackets and ampersands in the message of a failure are shown as text."""
    text = html.run_page(run, account(run), made="<now>")
    assert "SIGBUS &lt;on GPU 3&gt; &amp; left" in text
    assert "<on GPU 3>" not in text
    assert any("SIGBUS <on GPU 3> & left" in each for each in checked(text).words)
    assert tag("td", "a<b", data_label='"x"') == '<td data-label="&quot;x&quot;">a&lt;b</td>'


def test_pictures_and_tables_have_labels(run: RunHistory) -> None:
    """Every picture has a label, every table a caption, and every cell the name of its column."""
    found = checked(html.run_page(run, account(run), made="now"))
    charts = [attributes for name, attributes in found.tags if attributes.get("class") == "chart"]
    assert len(charts) == 12
    assert all(each["role"] == "img" and len(each["aria-label"] or "") > 20 for each in charts)
    names = [name for name, _ in found.tags]
    assert names.count("table") == names.count("caption") == 3
    assert names.count("h1") == 1
    cells = [attributes for name, attributes in found.tags if name == "td"]
    assert all("data-label" in each for each in cells)


def test_parts_differ_without_colour() -> None:
    """Each kind of part has its own pattern, except the two plain ones."""
    patterns = {kind: re.search(rf"\.{kind} {{ fill: url\(#([\w-]+)\)", CSS) for kind in bars.KINDS.values()}
    plain_ones = {kind for kind, found in patterns.items() if not found}
    assert plain_ones == {"useful", "rest"}
    named = [found[1] for found in patterns.values() if found]
    assert len(set(named)) == len(named)
    assert all(f'id="{name}"' in PATTERNS for name in named)


def test_a_boot_is_shown_as_a_part() -> None:
    """The boot is on the timeline, on the bar of shares, in the tables and in the keys."""
    leg = LEGS[0]._replace(last=478, end="done", boot_s=600)
    booted = RunHistory("b", "/b", (AttemptHistory(1, tuple(journey((leg,))[0])),), (), "then")
    one = account(booted)
    drawn = bars.timeline(one, 940)
    assert "attempt 1: boot until the claim 10 min 00 s" in drawn
    assert 'class="part boot"' in bars.time_bar(one.hours, 940)
    assert ("boot until the claim", "10 min 00 s") in [row[:2] for row in tables.time_parts(one).rows]
    assert "boot until the claim" in [row[0] for row in tables.comparison((one, one)).rows]
    label = checked(html.run_page(booted, one, made="now")).words
    assert label.count("boot until the claim") == 2


def test_the_timeline_has_a_lane_for_each_place(run: RunHistory) -> None:
    """Each lane has its price, and each attempt says in words how it ended."""
    drawn = bars.timeline(account(run), 940)
    for leg in LEGS:
        assert leg.infra in drawn
    for label in ("1 ✕ lost", "2 ◆ preempted", "3 ! failed", "4 ✓ done", "on demand · 22.32 $/h"):
        assert label in drawn


def test_a_timeline_s_parts_fill_each_bar(run: RunHistory) -> None:
    """The seconds of the parts add up to the paid time of the attempt."""
    for one in account(run).attempts:
        assert sum(part.seconds for part in bars.timeline_spans(one)) == pytest.approx(one.hours.paid_s)


def test_curves_show_where_attempts_ended_and_what_was_redone(run: RunHistory) -> None:
    """Lost steps are separate curves."""
    loss, accuracy = panels(run)
    assert loss.losses == ((143, "1 lost"), (268, "2 preempted"), (290, "3 failed"))
    assert loss.redone == ((100, 143), (250, 268), (250, 290))
    assert [len(curve.points) for curve in loss.curves if curve.kind == "lost"] == [44, 19, 40]
    drawn = curves.draw(loss, 940, 300)
    for label in ("1 lost", "2 preempted", "3 failed", "optimizer step", "train", "test", "steps 251 to 290"):
        assert label in drawn
    assert accuracy.unit == "share of pairs"


@pytest.mark.parametrize(
    "values", [[], [math.nan], [math.nan, 1.0, math.nan], [2.0], [5.0] * 9, [math.inf, 1.0]]
)
def test_strange_curves_are_drawn(values: list[float]) -> None:
    """Curves may have no value, one value, equal values, or no finite value."""
    points = [(float(step), value) for step, value in enumerate(values)]
    drawn = curves.draw(Panel("Loss", "loss", (Curve("train", "train", points, noisy=True),), 10), 340, 240)
    checked(drawn)
    assert "nan" not in drawn.replace("nan to", "")
    assert "inf" not in drawn


def test_outliers_do_not_flatten_the_curve() -> None:
    """They are cut off, and a note says so."""
    points = [(float(step), 1000.0 if step == 7 else 1.0 + step / 500) for step in range(500)]
    drawn = curves.draw(Panel("Loss", "loss", (Curve("train", "train", points, noisy=True),), 500), 940, 300)
    assert "cut off: up to 1e+03" in drawn


@pytest.mark.parametrize("steps", [0, 1, 30])
def test_a_run_of_any_length_has_a_page(tmp_path: Path, steps: int) -> None:
    """A page needs no steps, no prices and no plan."""
    write_events(tmp_path / "a-run", attempt_events(1, start=0, last=steps, total_steps=40))
    run = Reader(open_run(str(tmp_path), "a-run"), "a-run").read()
    text = html.run_page(run, account(run), made="now")
    checked(text)
    assert "Predictions of the plan" not in text
    assert "price unknown" in text


def test_two_runs_are_compared(run: RunHistory) -> None:
    """Their facts are in columns, and their curves in one panel."""
    one = account(run)
    text = html.comparison_page((run, run), (one, one), made="now")
    found = checked(text)
    assert "A test" in text
    assert "B test" in text
    assert any(each == "Side by side" for each in found.words)


def test_the_plan_is_compared_with_the_actual_values(run: RunHistory) -> None:
    """Each row has the predicted value, the actual value and the difference."""
    rows = tables.plan_comparison(account(run))
    assert rows is not None
    found = {row[0]: row[1:] for row in rows.rows}
    assert found["dollars"] == ("41.00", "21.86", "-47%")
    assert found["GiB per GPU"] == ("74.0", "70.4", "-5%")


def test_ticks_are_round() -> None:
    """Numbers are multiples of 1, 2 or 5 times a power of ten; times are round in minutes or hours."""
    assert ticks(0, 478, 5) == [0, 100, 200, 300, 400]
    assert ticks(0.43, 0.71, 5) == [0.5, 0.6, 0.7]
    assert ticks(3, 3, 5) == [3]
    assert [plain(each, [0.45, 0.5]) for each in (0.45, 0.5)] == ["0.45", "0.50"]
    assert [label for _, label in moments(8192, 8)] == ["0", "30 min", "1 h", "1 h 30", "2 h"]
    assert [label for _, label in moments(90, 8)] == [
        "0",
        "15 s",
        "30 s",
        "45 s",
        "1:00 min",
        "1:15 min",
        "1:30 min",
    ]
