"""Options that the launcher and the trainer share: durations on both command lines, and a task's environment variables."""

from __future__ import annotations

import re
from typing import Any

import click

PRICES = "AEOLUS_PRICES"
"""Prices of the plan's machines in all their regions. `trainer.supervisor.price` parses them."""
PLAN = "AEOLUS_PLAN"
"""The plan's prediction for the run, as a JSON object."""
USD_PER_H = "AEOLUS_USD_PER_H"
"""Hourly price of the user's own machines, all nodes together; overrides the prices."""
BUDGET_USD = "AEOLUS_BUDGET_USD"
"""The most that all attempts of the run may cost together."""
DEADLINE_H = "AEOLUS_DEADLINE_H"
"""The most hours from the first attempt's claim to the end of the run."""
HOURS = {"m": 1 / 60, "h": 1.0, "d": 24.0}


class DurationParam(click.ParamType):
    """A duration in hours: `90m`, `24h`, `2d`; a number without a unit means hours."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhd]?)", str(value).strip().lower())
        if not match or not float(match[1]):
            self.fail(f"{value!r} is not a duration; examples: 90m, 24h, 2d", param, ctx)
        return float(match[1]) * HOURS[match[2] or "h"]
