"""Curves on a terminal in braille characters, each of which has two columns and four rows of dots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a braille character, by row and column: https://www.unicode.org/charts/PDF/U2800.pdf"""
MARGIN = 8
"""Characters left of the curves, for the numbers of the vertical axis."""
Points = Sequence[tuple[float, float]]


class BrailleCurve(NamedTuple):
    """A curve that is drawn as a line; with `sign`, as that character at each point."""

    points: Points
    style: str
    sign: str | None = None


def plot(
    lines: Sequence[BrailleCurve], *, width: int, height: int, last_step: int, ends: Sequence[int] = ()
) -> list[Text]:
    """Return rows of text; the lowest holds the steps.

    Args:
        lines: the curves; later ones are drawn over earlier ones.
        width: characters, including the numbers on the left.
        height: rows, including the row of the steps.
        last_step: the step at the right end; the left end is step 0.
        ends: steps at which attempts ended.
    """
    columns, rows = max(8, width - MARGIN), max(2, height - 1)
    every = [value for curve in lines for _, value in curve.points if math.isfinite(value)]
    low, high = min(every, default=0.0), max(every, default=1.0)
    canvas = Canvas(columns, rows, max(last_step, 1), low, high if high > low else low + 1.0)
    # The lines for ended attempts come first, so that the curves cover them.
    for step in ends:
        canvas.upright(step)
    for curve in lines:
        canvas.draw(curve)
    found = []
    for nth, row in enumerate(canvas.rows()):
        value = high if nth == 0 else low if nth == rows - 1 else None
        number = "" if value is None or not every else _short(value)
        found.append(Text(f"{number:>{MARGIN - 2}} ", style="dim").append("│").append_text(row))
    right = f"{last_step:,}"
    found.append(Text(" " * MARGIN + "0" + " " * (columns - 1 - len(right)) + right, style="dim"))
    return found


def _short(value: float) -> str:
    words = f"{value:.3g}"
    return words if len(words) < MARGIN - 1 else f"{value:.0e}"


class Canvas:
    """A grid of characters; each has dots or a sign, and one style."""

    def __init__(self, columns: int, rows: int, last_step: int, low: float, high: float) -> None:
        self._columns, self._rows = columns, rows
        self._last_step, self._low, self._high = last_step, low, high
        self._bits: dict[tuple[int, int], int] = {}
        self._signs: dict[tuple[int, int], str] = {}
        self._styles: dict[tuple[int, int], str] = {}

    def draw(self, line: BrailleCurve) -> None:
        before: tuple[int, int] | None = None
        for step, value in line.points:
            if not math.isfinite(value):
                before = None
                continue
            x, y = self._dot(step, value)
            if line.sign:
                self._signs[x // 2, y // 4] = line.sign
                self._styles[x // 2, y // 4] = line.style
            else:
                self._join(before or (x, y), (x, y), line.style)
            before = (x, y)

    def upright(self, step: float) -> None:
        """Draw a dashed vertical line below all curves."""
        column = self._dot(step, self._low)[0] // 2
        for row in range(self._rows):
            self._signs[column, row] = "┊"
            self._styles[column, row] = "dim"

    def rows(self) -> list[Text]:
        return [self._row(row) for row in range(self._rows)]

    def _row(self, row: int) -> Text:
        text = Text()
        for column in range(self._columns):
            at = (column, row)
            sign = self._signs.get(at)
            if (bits := self._bits.get(at)) and sign in (None, "┊"):
                sign = chr(0x2800 + bits)
            text.append(sign or " ", style=self._styles.get(at))
        return text

    def _dot(self, step: float, value: float) -> tuple[int, int]:
        across, down = self._columns * 2 - 1, self._rows * 4 - 1
        share = (value - self._low) / (self._high - self._low)
        return round(across * min(1.0, step / self._last_step)), round(down * (1 - share))

    def _join(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        """Set every dot between two dots."""
        far = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for nth in range(far + 1):
            x = round(start[0] + (end[0] - start[0]) * nth / far)
            y = round(start[1] + (end[1] - start[1]) * nth / far)
            at = (x // 2, y // 4)
            self._bits[at] = self._bits.get(at, 0) | DOTS[y % 4][x % 2]
            self._styles[at] = style
