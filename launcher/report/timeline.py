"""When each attempt ran, and where: a lane for each place, a bar for each attempt, what it did in patterns."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from launcher.render import duration
from launcher.report.svg import Markup, Scale, box, chart, joined, line, moments, tag, text
from launcher.runs.account import Account, AttemptAccount

BAR, TOP, BOTTOM = 20.0, 2.0, 44.0
CHARACTER_PX = 6.6
MARKS = {"done": "✓", "lost": "✕", "preempted": "◆", "failed": "!", "superseded": "»", "at work": "▸"}
"""Beside a bar: how the attempt ended. None of them is told by its colour."""
WIDE_PX = 600


class TimelineSpan(NamedTuple):
    """A stretch of an attempt, in the order in which it came, as far as sums can tell."""

    kind: str
    seconds: float
    said: str


def parts(attempt: AttemptAccount) -> Iterator[TimelineSpan]:
    """Boot, set-up, useful steps with their evaluations and saves, steps that were lost, and what came last."""
    spent = attempt.hours
    begin = spent.setup_s + spent.restore_s
    between = spent.evaluation_s + spent.stall_s
    steps = spent.useful_s + spent.redone_s
    share = spent.useful_s / steps if steps else 1.0
    yield TimelineSpan("boot", spent.boot_s, f"boot until the claim {duration(spent.boot_s)}")
    yield TimelineSpan(
        "setup", begin, f"set-up {duration(spent.setup_s)}, restore {duration(spent.restore_s)}"
    )
    yield TimelineSpan("useful", spent.useful_s + between * share, "useful steps, with evaluations and saves")
    yield TimelineSpan(
        "redone", spent.redone_s + between * (1 - share), f"{attempt.lost_steps} steps that were redone later"
    )
    yield TimelineSpan("rest", spent.upload_s + spent.other_s, "last upload, export, and other")


def draw(account: Account, width: float) -> Markup:
    """All attempts of a run over the time since the first."""
    lanes = Lanes(account, width)
    back: list[Markup] = []
    front: list[Markup | None] = []
    before: tuple[float, float] | None = None
    for attempt in account.attempts:
        start, end, top = lanes.span(attempt)
        if before:
            back.append(_gap(before, (start, top + BAR / 2), attempt.waited_s))
        front.append(_bar(attempt, start, end, top))
        front.append(lanes.ending(attempt, start, top))
        before = (end, top + BAR / 2)
    return chart(
        width, lanes.floor + BOTTOM, _spoken(account), *lanes.rules(), *back, *lanes.places(), *front
    )


class Lanes:
    """Where things lie: a lane for each place, its name beside it, or on a phone above it."""

    def __init__(self, account: Account, width: float) -> None:
        self._wide = width > WIDE_PX
        self._width = width
        self._began = datetime.fromisoformat(account.attempts[0].began)
        self._places = list(dict.fromkeys(_place(each) for each in account.attempts))
        self._lane = 46.0 if self._wide else 64.0
        self._wall_s = max(account.wall_s, 1.0)
        self._x = Scale(0, self._wall_s, 190.0 if self._wide else 4.0, width - 24)
        self._free_from = dict.fromkeys(self._places, 0.0)
        self.floor = TOP + self._lane * len(self._places)

    def span(self, attempt: AttemptAccount) -> tuple[float, float, float]:
        """Left, right and top of its bar."""
        top = TOP + (self._places.index(_place(attempt)) + 1) * self._lane - BAR - 7
        start = (datetime.fromisoformat(attempt.began) - self._began).total_seconds()
        return self._x(start), self._x(start + attempt.hours.paid_s), top

    def ending(self, attempt: AttemptAccount, start: float, top: float) -> Markup | None:
        """Above the bar: its number and how it ended, or less of it, or nothing where there is no room."""
        place, mark = _place(attempt), MARKS.get(attempt.how, "■")
        for words in (f"{attempt.number} {mark} {attempt.how}", f"{attempt.number} {mark}"):
            wide = len(words) * CHARACTER_PX
            left = min(start + 3, self._width - wide)
            if left >= self._free_from[place]:
                self._free_from[place] = left + wide + 6
                return text(words, left, top - 5, "said halo")
        return None

    def places(self) -> list[Markup]:
        """Their names and prices."""
        found = []
        for nth, (where, price) in enumerate(self._places):
            top = TOP + nth * self._lane
            if self._wide:
                found += [text(where, 0, top + 20, "strong"), text(price, 0, top + 36, "unit")]
            else:
                name = tag("tspan", where, class_="strong")
                found.append(tag("text", name, f"  {price}", x=4, y=top + 14, class_="unit halo"))
        return found

    def rules(self) -> list[Markup]:
        """Between lanes, and the time below them."""
        x, floor = self._x, self.floor
        found = [
            line(0, TOP + nth * self._lane, self._width, TOP + nth * self._lane, "grid")
            for nth in range(1, len(self._places))
        ]
        for at, said in moments(self._wall_s, 8 if self._wide else 4):
            found += [
                line(x(at), floor, x(at), floor + 4, "axis"),
                text(said, x(at), floor + 17, "tick", anchor="middle" if at else "start"),
            ]
        since = f"time since {self._began:%Y-%m-%d %H:%M} UTC"
        found += [
            line(x.start, floor, x.end, floor, "axis"),
            text(since, (x.start + x.end) / 2, floor + 36, "unit", anchor="middle"),
        ]
        return found


def _bar(attempt: AttemptAccount, start: float, end: float, top: float) -> Markup:
    """Its parts one after the other."""
    paid_s = attempt.hours.paid_s or 1.0
    marks, at = [], start
    for part in parts(attempt):
        wide = (end - start) * part.seconds / paid_s
        if wide > 0.2:
            marks.append(
                box(at, top, wide, BAR, f"part {part.kind}", f"attempt {attempt.number}: {part.said}")
            )
        at += wide
    marks.append(box(start, top, end - start, BAR, "outline", f"attempt {attempt.number}: {attempt.how}"))
    return joined(marks)


def _gap(before: tuple[float, float], then: tuple[float, float], waited_s: float) -> Markup:
    """From the end of one to the begin of the next: nobody had a machine."""
    points = f"M{before[0]:.1f} {before[1]:.1f}V{(before[1] + then[1]) / 2:.1f}H{then[0]:.1f}V{then[1]:.1f}"
    said = tag("title", f"{duration(waited_s)} without a machine")
    return tag("path", said, d=points, class_="gap")


def _place(attempt: AttemptAccount) -> tuple[str, str]:
    price = "" if attempt.usd_per_h is None else f"{attempt.usd_per_h:.2f} $/h"
    return attempt.where, " · ".join(filter(None, (attempt.market, price)))


def _spoken(account: Account) -> str:
    each = "; ".join(
        f"attempt {one.number} on {one.where} for {duration(one.hours.paid_s)}, {one.how}"
        for one in account.attempts
    )
    return f"Attempts over time: {each}"
