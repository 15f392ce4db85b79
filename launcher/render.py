"""Format numbers and tables for the terminal, and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

NOTHING = "–"  # noqa: RUF001 (the dash is intended)
"""Shown for a missing value."""


def duration(seconds: float) -> str:
    """Return a duration as `45 s`, `3 min 05 s`, `2 h 10 min` or `3 d 04 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes >= 48 * 60:
        hours = round(minutes / 60)
        return f"{hours // 24} d {hours % 24:02d} h"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def ago(seconds: float) -> str:
    """Return an age in one unit: `45 s ago`, `3 h ago`."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def size(count: float) -> str:
    """Return a number of bytes in binary units: `512 B`, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def change(ends: tuple[float, float] | None, form: str = ".4f") -> str:
    """Return the first and the last value: `0.6931 → 0.4102`."""
    return NOTHING if ends is None else f"{ends[0]:{form}} → {ends[1]:{form}}"


def usd(value: float | None) -> str:
    """Return an amount as `$12.34`, without cents from $1,000 on."""
    if value is None:
        return NOTHING
    return f"${value:,.2f}" if value < 1000 else f"${value:,.0f}"


def facts_table(rows: Iterable[tuple[str, str]], *, title: str) -> Table:
    """Return a two-column table: names on the left, values on the right."""
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(
            *map(Text, row)
        )  # plain Text, because brackets in names and messages would be read as markup
    return table


def list_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table with one row per item.

    The first column is never wrapped, so that a name can be copied. A column whose name begins with `>` is
    right-aligned, for numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for nth, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), overflow="fold", justify=side, no_wrap=nth == 0)
    for row in rows:
        table.add_row(
            *map(Text, row)
        )  # plain Text, because brackets in names and messages would be read as markup
    return table


def to_json(value: Any) -> str:
    """Return one line of strict JSON; NaN and infinities become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value
