"""What a run has spent over all its attempts, by their events, and whether its limits leave it anything; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainer.events import Event, of_kind

What = Literal["budget", "deadline"]
Events = Sequence[Event]


class Limits(BaseModel):
    """The most that a run may take, all attempts together; no part of what makes it that run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_usd: float | None = Field(default=None, gt=0)
    deadline_h: float | None = Field(default=None, gt=0)
    """Wall clock since the first attempt claimed the run, also while no machine is held."""

    def __bool__(self) -> bool:
        return (self.budget_usd, self.deadline_h) != (None, None)


class Spent(NamedTuple):
    """What attempts have taken, from when on they are paid to what was heard of them last."""

    hours: float
    usd: float
    """Of the attempts whose price is known."""
    unpriced_h: float
    """Hours of those whose price nobody knows."""


class Limit(NamedTuple):
    """One limit, and how much of it is used."""

    what: What
    of: float
    """Dollars or hours, as `used`."""
    used: float

    @property
    def share(self) -> float:
        return self.used / self.of

    def __str__(self) -> str:
        if self.what == "budget":
            return f"${self.used:,.2f} of the budget of ${self.of:,.2f}"
        return f"{self.used:.2f} h of the deadline of {self.of:g} h"


def of_attempt(events: Events) -> Spent:
    """What one attempt took; a clock that was set back makes it no shorter than its longest reading."""
    if not events:
        return Spent(0.0, 0.0, 0.0)
    claimed = _claim(events)
    hours = _since_claim_h(events) + boot_s(claimed) / 3600
    usd_per_h = (claimed.get("price") or {}).get("usd_per_h")
    return Spent(hours, 0.0, hours) if usd_per_h is None else Spent(hours, hours * usd_per_h, 0.0)


def boot_s(claimed: Event) -> float:
    """Seconds before its claim that an attempt is paid for: since its machine booted, where the claim tells of that."""
    if not (booted := claimed.get("booted")):
        return 0.0
    return max(0.0, (_time(claimed) - datetime.fromisoformat(booted)).total_seconds())


def of_run(attempts: Iterable[Events]) -> Spent:
    """What all of them took."""
    parts = [of_attempt(events) for events in attempts]
    return Spent(*(sum(part[index] for part in parts) for index in range(3)))


def age_h(attempts: Sequence[Events], now: datetime) -> float:
    """Hours since the first claim; at least those of the attempts, should this machine's clock be behind theirs."""
    claims = [_time(event) for events in attempts for event in of_kind(events, "claimed")]
    if not claims:
        return 0.0
    return max((now - claims[0]).total_seconds() / 3600, sum(map(_since_claim_h, attempts)))


def standing(limits: Limits, *, usd: float, hours: float) -> list[Limit]:
    """Each limit that there is, and what is used of it.

    Args:
        limits: the run's.
        usd: spent by all attempts.
        hours: since the first claim.
    """
    found: list[Limit] = []
    if limits.budget_usd is not None:
        found.append(Limit("budget", limits.budget_usd, usd))
    if limits.deadline_h is not None:
        found.append(Limit("deadline", limits.deadline_h, hours))
    return found


def used_up(
    attempts: Sequence[Events], limits: Limits, now: datetime, *, boot_usd: float = 0.0
) -> Limit | None:
    """The limit that leaves another attempt nothing, after what its own boot has cost; None if there is something left.

    A run that stopped for a limit stopped before it, to have time to save: the same limit, or a lower one, is used up.
    """
    stopped = {
        event["what"]: event["limit"] for events in attempts[-1:] for event in of_kind(events, "stopped")
    }
    for each in standing(limits, usd=of_run(attempts).usd + boot_usd, hours=age_h(attempts, now)):
        if each.share >= 1.0 or each.of <= stopped.get(each.what, 0.0):
            return each
    return None


def _since_claim_h(events: Events) -> float:
    if not events:
        return 0.0
    return max(0.0, (max(map(_time, events)) - _time(_claim(events))).total_seconds() / 3600)


def _claim(events: Events) -> Event:
    return next(iter(of_kind(events, "claimed")), events[0])


def _time(event: Event) -> datetime:
    return datetime.fromisoformat(event["time"])
