"""Building blocks of the report: escaped markup, SVG shapes, scales and axis ticks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

Attribute = str | float | None

MOMENTS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800)  # fmt: skip
"""Intervals between the ticks of a time axis, seconds."""


class Markup(str):
    """Text that is already markup. Any other text is escaped when it becomes a child of an element."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: Attribute) -> Markup:
    """Return an element.

    Attribute names are changed from Python to HTML: `class_` becomes `class`, `stroke_width` becomes `stroke-width`.
    Attributes that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def joined(children: Iterable[str | None]) -> Markup:
    """Return the children as one markup, each escaped unless it is markup itself."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(child) for child in children if child is not None
        )
    )


def number(value: str | float) -> str:
    """Return a number with at most one decimal, which is enough for pixels."""
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def chart(width: float, height: float, label: str, *children: str | None) -> Markup:
    """Return an SVG picture that scales with the page; `label` describes it to screen readers."""
    return tag(
        "svg", *children, viewBox=f"0 0 {number(width)} {number(height)}", role="img", aria_label=label,
        class_="chart", preserveAspectRatio="xMinYMin meet",
    )  # fmt: skip


def text(words: str, x: float, y: float, kind: str = "", *, anchor: str | None = None) -> Markup:
    return tag("text", words, x=x, y=y, class_=kind or None, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def box(x: float, y: float, width: float, height: float, kind: str, hover: str | None = None) -> Markup:
    """Return a rectangle; the browser shows `hover` while the pointer is over it."""
    title = tag("title", hover) if hover else None
    return tag("rect", title, x=x, y=y, width=max(width, 0.5), height=height, class_=kind)


def path(points: Sequence[tuple[float, float]], kind: str) -> Markup:
    """Return a line through points, interrupted where a value is not a finite number."""
    commands: list[str] = []
    pen_down = False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{number(x)} {number(y)}")
        pen_down = math.isfinite(y)
    return tag("path", d="".join(commands), class_=kind)


class Scale(NamedTuple):
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)

    def within(self, value: float) -> float:
        """Return the pixel of a value, clipped to the range of the chart."""
        return self(min(max(value, self.low), self.high))


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) in a range, at most about `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / max(most, 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * part for part in (1, 2, 5, 10) if power * part >= rough * 0.9999)
    first = math.ceil(low / step - 1e-9)
    return [round(nth * step, 12) for nth in range(first, math.floor(high / step + 1e-9) + 1)]


def moments(high_s: float, most: int) -> list[tuple[float, str]]:
    """Return round times from 0 to `high_s` in seconds, at most about `most`, each with its label."""
    step = next((seconds for seconds in MOMENTS_S if high_s / seconds <= most), MOMENTS_S[-1])
    return [(nth * step, _moment(nth * step, step)) for nth in range(int(high_s // step) + 1)]


def _moment(seconds: float, step: float) -> str:
    if not seconds:
        return "0"
    if step >= 86400:
        return f"{seconds / 86400:.0f} d"
    if step >= 3600:
        return f"{seconds / 3600:.0f} h"
    if step >= 60 and seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if step >= 60:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02d}" if minutes else f"{hours} h"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min" if minutes else f"{rest} s"


def plain(value: float, among: Sequence[float]) -> str:
    """Return a tick's label with as many decimals as its neighbours need."""
    gaps = [abs(after - before) for before, after in itertools.pairwise(among) if after != before]
    smallest = min(gaps, default=abs(value) or 1.0)
    if smallest < 1e-4 or abs(value) >= 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    return f"{value:.{max(0, math.ceil(-math.log10(smallest) - 1e-9))}f}"
