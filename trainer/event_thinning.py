"""Keeps a log small and its curves whole: of what is told often, the extremes of equal spans and the newest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

MOST: Mapping[str, int] = {
    "step": 1024,
    "eval": 256,
    "saved": 256,
    "committed": 256,
    "save_skipped": 64,
    "upload_failed": 64,
    "rejected": 64,
    "window": 64,
    "notice": 64,
    "log": 256,
}
"""Lines of each kind that are kept at most, so that a log stays below a mebibyte; other kinds come once in an attempt."""
WHOLE_TAIL = 4
"""One part in so many is the newest lines, which are kept as they came."""
VALUES: Mapping[str, str] = {"step": "loss", "eval": "eval_loss"}
"""Whose extremes make a curve's shape."""


class EventLine(NamedTuple):
    """One event as it is written."""

    order: int
    """Among all events of the log."""
    nth: int
    """Among those of its kind."""
    value: float | None
    data: bytes


class EventLines:
    """The lines of one kind. A span is so many events that followed each other; its length doubles when they are
    too many, so every part of the log is as fine as every other, but for the newest lines and the first.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._span = 1
        self._told = 0
        self._lines: list[EventLine] = []

    def add(self, order: int, value: object, data: bytes) -> None:
        number = float(value) if isinstance(value, int | float) else None
        self._lines.append(EventLine(order, self._told, number, data))
        self._told += 1
        if self._most and len(self._lines) > self._most:
            self._thin(self._most)

    def __iter__(self) -> Iterator[EventLine]:
        return iter(self._lines)

    def _thin(self, most: int) -> None:
        tail = most // WHOLE_TAIL
        first, older, newest = self._lines[:1], self._lines[1:-tail], self._lines[-tail:]
        while len(first) + len(older) + len(newest) > most - tail:
            older = _extremes(older, self._span)
            if len(first) + len(older) + len(newest) > most - tail:
                self._span *= 2
        self._lines = [*first, *older, *newest]


def _extremes(lines: list[EventLine], span: int) -> list[EventLine]:
    """Of each span the lines with the least and the greatest value; without values, the last one."""
    spans: dict[int, list[EventLine]] = {}
    for line in lines:
        spans.setdefault(line.nth // span, []).append(line)
    kept: list[EventLine] = []
    for members in spans.values():
        numbered = [line for line in members if line.value is not None and not math.isnan(line.value)]
        if numbered:
            kept += sorted({min(numbered, key=_value), max(numbered, key=_value)})
        else:
            kept.append(members[-1])
    return kept


def _value(line: EventLine) -> float:
    return line.value or 0.0
