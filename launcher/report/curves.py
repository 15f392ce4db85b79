"""Panels as pictures: curves with their names, what was redone, where attempts ended."""

from __future__ import annotations

import math

from launcher.report.series import Curve, Panel, Points
from launcher.report.svg import Markup, Scale, box, chart, joined, line, path, plain, tag, text, ticks

TOP, BOTTOM, LEFT, RIGHT = 44.0, 44.0, 52.0, 62.0
MEAN_FROM = 60
"""Points from which on a running mean is drawn over them."""
PERIODS = 40
"""Of the curve, over which the mean is taken one after the other."""
CHARACTER_PX = 6.6


def draw(panel: Panel, width: float, height: float) -> Markup:
    """The panel as a picture of so many pixels."""
    low, high, cut = _range(panel)
    labels = [curve.label for curve in panel.curves if curve.label and curve.points]
    right = max(RIGHT, max((len(label) for label in labels), default=0) * CHARACTER_PX + 16)
    x = Scale(0, panel.last_step, LEFT, width - right)
    y = Scale(low, high, height - BOTTOM, TOP)
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
        _spoken(panel),
        frame,
        tag("g", *inside, clip_path=f"url(#{clip})"),
        _axes(panel, x, y, width, height),
        _ends(panel, x, height),
        _names(panel, x, y, half),
        text(cut, x.end, height - 8, "note", anchor="end") if cut else None,
    )


def _range(panel: Panel) -> tuple[float, float, str]:
    """What the upward axis shows; a few wild values do not flatten all others, and it is said."""
    every = sorted(value for curve in panel.curves for _, value in curve.points if math.isfinite(value))
    if not every:
        return 0.0, 1.0, ""
    low, high, cut = every[0], every[-1], ""
    most = every[int(0.985 * (len(every) - 1))]
    if len(every) >= 200 and high - most > 0.8 * (most - low):
        cut, high = f"cut off: up to {high:.3g}", most + 0.15 * (most - low)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 0.5
    if panel.unit.startswith("share"):
        return max(0.0, low - margin), min(1.0, high + margin), cut
    return low - margin, high + margin, cut


def _curve(curve: Curve, x: Scale, y: Scale, half: int) -> Markup:
    points = [(x(step), y(value)) for step, value in _fewer(curve.points, int(x.end - x.start))]
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


def _fewer(points: Points, most: int) -> Points:
    """At most two for each pixel, the extremes of what lies there."""
    if len(points) <= max(most, 1):
        return points
    each = math.ceil(len(points) / max(most // 2, 1))
    spans = [points[at : at + each] for at in range(0, len(points), each)]
    return [point for span in spans for point in sorted({min(span, key=_value), max(span, key=_value)})]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def half_width(points: int) -> int:
    """Neighbours to each side that a mean is taken over: a fortieth of the curve, none of a short one."""
    return max(1, points // PERIODS // 2) if points >= MEAN_FROM else 0


def running_mean(points: Points, half: int) -> Points:
    """Of each point and so many neighbours to each side."""
    means = []
    for at, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, at - half) : at + half + 1] if math.isfinite(value)]
        means.append((step, sum(near) / len(near) if near else math.nan))
    return means


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
    """Spans that overlap become one: what was redone twice was redone."""
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


def _ends(panel: Panel, x: Scale, height: float) -> Markup:
    """Where attempts ended; their words in two rows, as far as they do not overlap."""
    marks: list[Markup] = []
    free_from = [LEFT, LEFT]
    for step, said in sorted(panel.losses):
        at = x(step)
        marks.append(line(at, TOP - 4, at, height - BOTTOM, "end"))
        places = [(row, words) for words in (said, said.split()[0]) for row in (0, 1)]
        for row, words in places:
            half = len(words) * CHARACTER_PX / 2
            if at - half >= free_from[row]:
                marks.append(text(words, at, TOP - 9 - 14 * row, "said halo", anchor="middle"))
                free_from[row] = at + half + 6
                break
    return joined(marks)


def _names(panel: Panel, x: Scale, y: Scale, half: int) -> Markup:
    """Each curve's name at its end, moved apart where they would overlap."""
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


def _spoken(panel: Panel) -> str:
    words = []
    for curve in panel.curves:
        finite = [value for _, value in curve.points if math.isfinite(value)]
        if curve.label and finite:
            words.append(f"{curve.label} from {finite[0]:.3g} to {finite[-1]:.3g}")
    lost = (
        f"; attempts that ended on the way: {', '.join(said for _, said in panel.losses)}"
        if panel.losses
        else ""
    )
    return f"{panel.title} over {panel.last_step} steps: {', '.join(words)}{lost}"
