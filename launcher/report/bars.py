"""Bar charts of the report: attempts over time, shares of the paid time, and predicted against measured memory."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from launcher.render import duration
from launcher.report.svg import (
    Markup,
    Scale,
    box,
    chart,
    joined,
    line,
    moments,
    plain,
    tag,
    text,
    ticks,
)
from launcher.runs.account import RUNNING, Account, AttemptAccount, Memory
from launcher.runs.time_breakdown import NAMES, TimeBreakdown

KINDS = {
    "useful_s": "useful",
    "redone_s": "redone",
    "setup_s": "setup",
    "boot_s": "boot",
    "restore_s": "restore",
    "evaluation_s": "evaluation",
    "stall_s": "stall",
    "upload_s": "upload",
    "other_s": "rest",
}
"""CSS class of each part of the paid time; every class has its own colour and pattern."""
MARKS = {"done": "✓", "lost": "✕", "preempted": "◆", "failed": "!", "superseded": "»", RUNNING: "▸"}
"""Sign beside a timeline bar for how the attempt ended, so that colour is not needed to read it."""
BAR, TOP, BOTTOM = 20.0, 2.0, 44.0
"""Pixels of the timeline: a bar's height, and the margins above and below all lanes."""
WIDE_PX = 600
"""In a timeline of at least this width the names of the lanes are left of the bars; in a narrower one they are above them."""
SHARE_CHARACTER_PX = 7.0
"""Width of a character on a bar of shares or memory."""
LABEL_CHARACTER_PX = 6.6
"""Width of a character above a timeline bar."""


class TimelineSpan(NamedTuple):
    """A part of an attempt's bar on the timeline."""

    kind: str
    """CSS class."""
    seconds: float
    label: str


def timeline(account: Account, width: float) -> Markup:
    """Return all attempts of a run over time: one lane for each place, one bar for each attempt."""
    lanes = TimelineLanes(account, width)
    # Gaps are drawn first, so that bars and labels cover them.
    back: list[Markup] = []
    front: list[Markup | None] = []
    previous: tuple[float, float] | None = None
    for attempt in account.attempts:
        start, end, top = lanes.span(attempt)
        if previous:
            back.append(_gap(previous, (start, top + BAR / 2), attempt.waited_s))
        front.append(_timeline_bar(attempt, start, end, top))
        front.append(lanes.ending(attempt, start, top))
        previous = (end, top + BAR / 2)
    label = "; ".join(
        f"attempt {one.number} on {one.where} for {duration(one.hours.paid_s)}, {one.how}"
        for one in account.attempts
    )
    return chart(
        width,
        lanes.floor + BOTTOM,
        f"Attempts over time: {label}",
        *lanes.rules(),
        *back,
        *lanes.places(),
        *front,
    )


def timeline_spans(attempt: AttemptAccount) -> Iterator[TimelineSpan]:
    """Yield the parts of an attempt's bar.

    Only sums are known, so each part is drawn in one piece: boot, set-up and restore, useful steps, lost steps, rest.
    Evaluations and saves are divided between useful and lost steps in proportion.
    """
    spent = attempt.hours
    begin = spent.setup_s + spent.restore_s
    between = spent.evaluation_s + spent.stall_s
    steps = spent.useful_s + spent.redone_s
    share = spent.useful_s / steps if steps else 1.0
    yield TimelineSpan("boot", spent.boot_s, f"{NAMES['boot_s']} {duration(spent.boot_s)}")
    yield TimelineSpan(
        "setup", begin, f"set-up {duration(spent.setup_s)}, restore {duration(spent.restore_s)}"
    )
    yield TimelineSpan("useful", spent.useful_s + between * share, "useful steps, with evaluations and saves")
    yield TimelineSpan(
        "redone", spent.redone_s + between * (1 - share), f"{attempt.lost_steps} steps that were redone later"
    )
    yield TimelineSpan("rest", spent.upload_s + spent.other_s, "last upload, export, and other")


def time_bar(spent: TimeBreakdown, width: float) -> Markup:
    """Return one bar with the parts of the paid time; parts that are wide enough show their share."""
    paid_s = spent.paid_s or 1.0
    at, marks = 0.0, []
    for name, kind in KINDS.items():
        wide = width * getattr(spent, name) / paid_s
        if wide < 0.4:
            continue
        share = f"{getattr(spent, name) / paid_s:.0%}"
        marks.append(box(at, 0, wide, 34, f"part {kind}", f"{NAMES[name]}: {share}"))
        if wide > len(share) * SHARE_CHARACTER_PX + 14:
            marks.append(text(share, at + wide / 2, 22, "on halo", anchor="middle"))
        at += wide
    shares = ", ".join(
        f"{NAMES[name]} {getattr(spent, name) / paid_s:.0%}" for name in KINDS if getattr(spent, name)
    )
    return chart(width, 35, f"Shares of the paid time: {shares}", *marks)


def memory_bar(memory: Memory, what: str, width: float) -> Markup:
    """Return two bars: the predicted peak, term by term, above the measured peak.

    Args:
        memory: the peaks.
        what: `GPU` or `Host`.
        width: pixels.
    """
    predicted, measured = memory.predicted_gib or 0.0, memory.measured_gib or 0.0
    capacity = memory.there_gib or 0.0
    # The scale includes the capacity only if that does not squeeze the bars.
    longest = max(predicted, measured, min(capacity, 1.6 * max(predicted, measured))) or 1.0
    x = Scale(0, longest, 74, width - 40)
    marks: list[Markup] = [text("predicted", 0, 30, "unit"), text("measured", 0, 60, "unit")]
    at = 0.0
    for name, gib in memory.terms:
        wide = x(at + gib) - x(at)
        marks.append(box(x(at), 14, wide, 24, "term", f"{name}: {gib:.1f} GiB"))
        if wide > len(name) * SHARE_CHARACTER_PX + 8:
            marks.append(text(name, x(at) + wide / 2, 30, "on", anchor="middle"))
        at += gib
    if predicted:
        marks.append(text(f"{predicted:.1f}", x(predicted) + 5, 30, "label halo"))
    if measured:
        marks.append(
            box(x(0), 44, x(measured) - x(0), 24, "part useful", f"measured peak: {measured:.1f} GiB")
        )
        marks.append(text(f"{measured:.1f}", x(measured) + 5, 60, "label halo"))
    else:
        marks.append(text("not measured", x(0) + 4, 60, "unit"))
    if 0 < capacity <= x.high:
        marks.append(line(x(capacity), 8, x(capacity), 74, "end"))
    scale = ticks(0, x.high, 6 if width > 600 else 3)
    marks += [text(plain(tick, scale), x(tick), 91, "tick", anchor="middle") for tick in scale]
    marks += [line(x(0), 75, x.end, 75, "axis"), text("GiB", x.end + 12, 91, "unit")]
    label = f"{what}: predicted {predicted:.1f} GiB, measured {measured:.1f} GiB, capacity {capacity:.1f} GiB"
    return chart(width, 98, label, *marks)


class TimelineLanes:
    """The geometry of the timeline: a lane for each place and price."""

    def __init__(self, account: Account, width: float) -> None:
        self._wide = width > WIDE_PX
        self._width = width
        self._began = datetime.fromisoformat(account.attempts[0].began)
        self._places = list(dict.fromkeys(_place(attempt) for attempt in account.attempts))
        self._lane = 46.0 if self._wide else 64.0
        self._wall_s = max(account.wall_s, 1.0)
        self._x = Scale(0, self._wall_s, 190.0 if self._wide else 4.0, width - 24)
        self._free_from = dict.fromkeys(self._places, 0.0)
        self.floor = TOP + self._lane * len(self._places)

    def span(self, attempt: AttemptAccount) -> tuple[float, float, float]:
        """Return the left, right and top of an attempt's bar."""
        top = TOP + (self._places.index(_place(attempt)) + 1) * self._lane - BAR - 7
        start = (datetime.fromisoformat(attempt.began) - self._began).total_seconds()
        return self._x(start), self._x(start + attempt.hours.paid_s), top

    def ending(self, attempt: AttemptAccount, start: float, top: float) -> Markup | None:
        """Return the label above a bar: its number and how it ended.

        Where the lane has too little room, the label is only the number and a sign, or None.
        """
        place, mark = _place(attempt), MARKS.get(attempt.how, "■")
        for words in (f"{attempt.number} {mark} {attempt.how}", f"{attempt.number} {mark}"):
            wide = len(words) * LABEL_CHARACTER_PX
            left = min(start + 3, self._width - wide)
            if left >= self._free_from[place]:
                self._free_from[place] = left + wide + 6
                return text(words, left, top - 5, "label halo")
        return None

    def places(self) -> list[Markup]:
        """Return the names and prices of the lanes."""
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
        """Return the lines between lanes, and the time axis below them."""
        x, floor = self._x, self.floor
        found = [
            line(0, TOP + nth * self._lane, self._width, TOP + nth * self._lane, "grid")
            for nth in range(1, len(self._places))
        ]
        for at, label in moments(self._wall_s, 8 if self._wide else 4):
            found += [
                line(x(at), floor, x(at), floor + 4, "axis"),
                text(label, x(at), floor + 17, "tick", anchor="middle" if at else "start"),
            ]
        since = f"time since {self._began:%Y-%m-%d %H:%M} UTC"
        found += [
            line(x.start, floor, x.end, floor, "axis"),
            text(since, (x.start + x.end) / 2, floor + 36, "unit", anchor="middle"),
        ]
        return found


def _timeline_bar(attempt: AttemptAccount, start: float, end: float, top: float) -> Markup:
    paid_s = attempt.hours.paid_s or 1.0
    marks, at = [], start
    for span in timeline_spans(attempt):
        wide = (end - start) * span.seconds / paid_s
        if wide > 0.2:
            marks.append(
                box(at, top, wide, BAR, f"part {span.kind}", f"attempt {attempt.number}: {span.label}")
            )
        at += wide
    marks.append(box(start, top, end - start, BAR, "outline", f"attempt {attempt.number}: {attempt.how}"))
    return joined(marks)


def _gap(end: tuple[float, float], begin: tuple[float, float], waited_s: float) -> Markup:
    """Return a dotted line from the end of one bar to the begin of the next: the time without a machine."""
    points = f"M{end[0]:.1f} {end[1]:.1f}V{(end[1] + begin[1]) / 2:.1f}H{begin[0]:.1f}V{begin[1]:.1f}"
    label = tag("title", f"{duration(waited_s)} without a machine")
    return tag("path", label, d=points, class_="gap")


def _place(attempt: AttemptAccount) -> tuple[str, str]:
    price = "" if attempt.usd_per_h is None else f"{attempt.usd_per_h:.2f} $/h"
    return attempt.where, " · ".join(filter(None, (attempt.market, price)))
