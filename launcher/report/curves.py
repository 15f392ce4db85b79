"""Metrics over the optimizer steps: the data of each panel, and its drawing as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.report.svg import Markup, Scale, box, chart, joined, line, path, plain, tag, text, ticks
from launcher.runs.account import RUNNING, ending
from launcher.runs.run import RunHistory, values
from launcher.runs.time_breakdown import useful_until
from trainer.events import of_kind
from trainer.metrics import CURVES, Metric

Points = list[tuple[float, float]]
"""Steps and values."""

MOST_PANELS = 2
"""The loss, and the first accuracy that the run has."""
TOP, BOTTOM, LEFT, RIGHT = 44.0, 44.0, 52.0, 62.0
"""Margins, pixels."""
MEAN_FROM = 60
"""A running mean is drawn over curves of at least this many points."""
PERIODS = 40
"""The running mean covers one part in this many of the curve."""
CHARACTER_PX = 6.6
"""Width of a character of a label."""


class Curve(NamedTuple):
    """One line of a panel."""

    label: str
    kind: str
    """CSS class, which sets colour and dashes."""
    points: Points
    marked: bool = False
    """Whether each point is drawn as a dot, as for evaluations."""
    noisy: bool = False
    """Whether a running mean is drawn over the points."""


@dataclass(frozen=True)
class Panel:
    """One metric over the steps, as data."""

    title: str
    unit: str
    """Label of the vertical axis."""
    curves: tuple[Curve, ...]
    last_step: int
    redone: tuple[tuple[int, int], ...] = ()
    """Spans of steps that were taken more than once."""
    losses: tuple[tuple[int, str], ...] = ()
    """Steps at which an attempt ended, each with a label such as `1 lost`."""


def panels(run: RunHistory) -> list[Panel]:
    """Return the panels of one run: its loss, and its accuracy if it has one."""
    found = [_panel(run, metric) for metric in CURVES]
    return [panel for panel in found if any(curve.points for curve in panel.curves)][:MOST_PANELS]


def comparison_panels(runs: Sequence[RunHistory], names: Sequence[str]) -> list[Panel]:
    """Return the same panels with the curves of several runs in each; every run has its own style."""
    found = []
    for metric in CURVES:
        curves = [
            Curve(f"{name} {label}".strip(), f"{kind} run{nth}", _points(run, key, tested=tested), tested, not tested)
            for nth, (run, name) in enumerate(zip(runs, names, strict=True))
            for label, kind, key, tested in (("", "train", metric.key, False), ("test", "test", metric.test_key, True))
        ]  # fmt: skip
        last = max((run.total_steps or run.step for run in runs), default=1)
        if any(curve.points for curve in curves):
            found.append(Panel(metric.title.capitalize(), metric.unit, tuple(curves), last))
    return found[:MOST_PANELS]


def draw(panel: Panel, width: float, height: float) -> Markup:
    """Return the panel as a picture of `width` by `height` pixels."""
    low, high, note = _range(panel)
    labels = [curve.label for curve in panel.curves if curve.label and curve.points]
    right = max(RIGHT, max((len(label) for label in labels), default=0) * CHARACTER_PX + 16)
    x = Scale(0, panel.last_step, LEFT, width - right)
    y = Scale(low, high, height - BOTTOM, TOP)
    # Curves are clipped, because cut-off values and moved names would otherwise be drawn over the axes. The id needs
    # the width, since the page has each picture twice.
    clip = f"{panel.title}-{width:.0f}".lower().replace(" ", "-")
    frame = tag(
        "clipPath", box(LEFT, TOP - 2, width - right - LEFT + 3, height - TOP - BOTTOM + 4, ""), id=clip
    )
    half = half_width(max((len(curve.points) for curve in panel.curves), default=0))
    inside = [
        _redone(panel, x, height),
        _grid(x, y, low, high),
        *(_curve(curve, x, y, half) for curve in panel.curves),
    ]
    return chart(
        width,
        height,
        _description(panel),
        frame,
        tag("g", *inside, clip_path=f"url(#{clip})"),
        _axes(panel, x, y, width, height),
        _attempt_ends(panel, x, height),
        _curve_names(panel, x, y, half),
        text(note, x.end, height - 8, "note", anchor="end") if note else None,
    )


def half_width(points: int) -> int:
    """Return how many neighbours on each side the running mean of so many points covers; 0 for a short curve."""
    return max(1, points // PERIODS // 2) if points >= MEAN_FROM else 0


def running_mean(points: Points, half: int) -> Points:
    """Return the mean of each point and its `half` neighbours on each side."""
    means = []
    for at, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, at - half) : at + half + 1] if math.isfinite(value)]
        means.append((step, sum(near) / len(near) if near else math.nan))
    return means


def _panel(run: RunHistory, metric: Metric) -> Panel:
    lost = []
    for attempt in run.attempts:
        after = useful_until(run, attempt)
        events = [event for event in of_kind(attempt.events, "step") if event["step"] >= after]
        if attempt.step > after:
            lost.append(Curve("", "lost", _pairs(*values(events, metric.key))))
    ended = [attempt for attempt in run.attempts if ending(run, attempt) not in ("done", RUNNING)]
    return Panel(
        metric.title.capitalize(),
        metric.unit,
        (
            Curve("train", "train", _points(run, metric.key, tested=False), noisy=True),
            *lost,
            Curve("test", "test", _points(run, metric.test_key, tested=True), marked=True),
        ),
        run.total_steps or max(run.step, 1),
        tuple((span.after, span.until) for span in run.redone),
        tuple((attempt.step, f"{attempt.number} {ending(run, attempt)}") for attempt in ended),
    )


def _points(run: RunHistory, key: str, *, tested: bool) -> Points:
    return _pairs(*values(run.evals if tested else run.steps, key))


def _pairs(steps: Sequence[int], numbers: Sequence[float]) -> Points:
    return [(float(step), number) for step, number in zip(steps, numbers, strict=True)]


def _range(panel: Panel) -> tuple[float, float, str]:
    """Return the range of the vertical axis, and a note if the highest values are cut off.

    A few outliers would flatten the rest of the curve. They are cut off if they are above the 98.5th percentile by
    more than 0.8 of the range below it.
    """
    every = sorted(value for curve in panel.curves for _, value in curve.points if math.isfinite(value))
    if not every:
        return 0.0, 1.0, ""
    low, high, note = every[0], every[-1], ""
    most = every[int(0.985 * (len(every) - 1))]
    if len(every) >= 200 and high - most > 0.8 * (most - low):
        note, high = f"cut off: up to {high:.3g}", most + 0.15 * (most - low)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 0.5
    if panel.unit.startswith("share"):
        return max(0.0, low - margin), min(1.0, high + margin), note
    return low - margin, high + margin, note


def _curve(curve: Curve, x: Scale, y: Scale, half: int) -> Markup:
    points = [(x(step), y(value)) for step, value in _thinned(curve.points, int(x.end - x.start))]
    mean = [(x(step), y(value)) for step, value in running_mean(curve.points, half)]
    if curve.kind == "lost":
        return path(mean, "line lost")
    if curve.noisy and half:
        return joined((path(points, f"line {curve.kind} raw"), path(mean, f"line {curve.kind}")))
    dots = [
        _dot(px, py, step, value, curve.kind)
        for (px, py), (step, value) in zip(points, curve.points, strict=False)
    ]
    return joined((path(points, f"line {curve.kind}"), *(dots if curve.marked and len(dots) <= 80 else ())))


def _dot(px: float, py: float, step: float, value: float, kind: str) -> Markup:
    return tag(
        "circle", tag("title", f"step {step:.0f}: {value:.4g}"), cx=px, cy=py, r=3.5, class_=f"dot {kind}"
    )


def _thinned(points: Points, most: int) -> Points:
    """Return at most `most` points: the lowest and the highest of each span of steps."""
    if len(points) <= max(most, 1):
        return points
    size = math.ceil(len(points) / max(most // 2, 1))
    spans = [points[at : at + size] for at in range(0, len(points), size)]
    return [point for span in spans for point in sorted({min(span, key=_value), max(span, key=_value)})]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _redone(panel: Panel, x: Scale, height: float) -> Markup:
    return joined(
        box(
            x(low),
            TOP,
            x(high) - x(low),
            height - TOP - BOTTOM,
            "redone-span",
            f"steps {low + 1} to {high} were redone",
        )
        for low, high in _union(panel.redone)
    )


def _union(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Merge spans that overlap, so that steps that were redone twice are hatched once."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def _grid(x: Scale, y: Scale, low: float, high: float) -> Markup:
    return joined(line(x.start, y(tick), x.end, y(tick), "grid") for tick in ticks(low, high, 5))


def _axes(panel: Panel, x: Scale, y: Scale, width: float, height: float) -> Markup:
    upward, along = ticks(y.low, y.high, 5), ticks(0, panel.last_step, 8 if width > 600 else 4)
    floor = height - BOTTOM
    return joined((
        *(text(plain(tick, upward), LEFT - 7, y(tick) + 4, "tick", anchor="end") for tick in upward),
        *(text(f"{tick:,.0f}", x(tick), floor + 17, "tick", anchor="middle") for tick in along if tick == int(tick)),
        line(LEFT, floor, x.end, floor, "axis"),
        text("optimizer step", (x.start + x.end) / 2, height - 8, "unit", anchor="middle"),
        text(panel.unit, 2, 14, "unit"),
    ))  # fmt: skip


def _attempt_ends(panel: Panel, x: Scale, height: float) -> Markup:
    """Return a vertical line where each attempt ended, with its label.

    Labels use two rows. A label that would overlap others is shortened to the attempt's number, or left out.
    """
    marks: list[Markup] = []
    free_from = [LEFT, LEFT]
    for step, label in sorted(panel.losses):
        at = x(step)
        marks.append(line(at, TOP - 4, at, height - BOTTOM, "end"))
        choices = [(row, words) for words in (label, label.split()[0]) for row in (0, 1)]
        for row, words in choices:
            half = len(words) * CHARACTER_PX / 2
            if at - half >= free_from[row]:
                marks.append(text(words, at, TOP - 9 - 14 * row, "label halo", anchor="middle"))
                free_from[row] = at + half + 6
                break
    return joined(marks)


def _curve_names(panel: Panel, x: Scale, y: Scale, half: int) -> Markup:
    """Return each curve's name at its right end; names that would overlap are moved apart."""
    ends = []
    for curve in panel.curves:
        points = running_mean(curve.points, half) if curve.noisy else curve.points
        finite = [point for point in points if math.isfinite(point[1])]
        if curve.label and finite:
            ends.append((y.within(finite[-1][1]), x(finite[-1][0]), curve))
    placed, floor = [], -math.inf
    for at, px, curve in sorted(ends, key=lambda end: end[:2]):
        floor = max(at, floor + 15)
        placed.append(text(curve.label, px + 8, floor + 4, f"name {curve.kind}"))
    return joined(placed)


def _description(panel: Panel) -> str:
    """Return the panel in words, for screen readers."""
    words = []
    for curve in panel.curves:
        finite = [value for _, value in curve.points if math.isfinite(value)]
        if curve.label and finite:
            words.append(f"{curve.label} from {finite[0]:.3g} to {finite[-1]:.3g}")
    ends = ", ".join(label for _, label in panel.losses)
    return f"{panel.title} over {panel.last_step} steps: {', '.join(words)}" + (
        f"; attempts that ended on the way: {ends}" if ends else ""
    )
