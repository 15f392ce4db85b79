"""Spans of time as people type them, for the options of both command lines."""

from __future__ import annotations

import re
from typing import Any

import click

HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


class DurationParam(click.ParamType):
    """`90m`, `24h`, `2d`; a plain number is hours."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", str(value).strip().lower())
        if not match or not float(match[1]):
            self.fail(f"{value!r} is no time: as in 90m, 24h or 2d", param, ctx)
        return float(match[1]) * HOURS[match[2] or "h"]
