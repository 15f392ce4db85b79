"""Hours and dollars of attempts and runs, and how much of a run's limits they use; computed from events alone.

Every place that shows or checks hours or dollars uses this module: `status`, `runs`, `report`, `watch`, the model card,
and the supervisor's budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from trainer.events import Event, of_kind

LimitKind = Literal["budget", "deadline"]
Events = Sequence[Event]

SPOT, ON_DEMAND = "spot", "on demand"


class Limits(BaseModel):
    """The most that a run may use over all its attempts; not part of the run's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget_usd: float | None = Field(default=None, gt=0)
    deadline_h: float | None = Field(default=None, gt=0)
    """Wall-clock hours since the first attempt's claim, including the time without a machine."""

    def __bool__(self) -> bool:
        return (self.budget_usd, self.deadline_h) != (None, None)


class Limit(NamedTuple):
    """One limit, and how much of it is used."""

    what: LimitKind
    of: float
    """The limit in dollars or hours, the same unit as `used`."""
    used: float

    @property
    def share(self) -> float:
        return self.used / self.of

    def __str__(self) -> str:
        if self.what == "budget":
            return f"${self.used:,.2f} of the budget of ${self.of:,.2f}"
        return f"{self.used:.2f} h of the deadline of {self.of:g} h"


class AttemptCost(NamedTuple):
    """The paid time of one attempt and its price."""

    seconds: float
    """Paid time: from the machine's boot (or the claim, if the boot is unknown) to the last event."""
    usd_per_h: float | None
    """Price of all nodes together; None if the price is unknown."""
    market: str | None
    """`spot`, `on demand`, or None for a machine that is not rented."""

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    @property
    def usd(self) -> float | None:
        return None if self.usd_per_h is None else self.usd_per_h * self.seconds / 3600


class RunCost(NamedTuple):
    """The paid time and the dollars of several attempts."""

    seconds: float
    """Paid time of all attempts, with or without a price."""
    unpriced_s: float
    """Paid time of the attempts without a price."""
    usd: float | None
    """None if no attempt has a price."""
    spot_usd: float
    on_demand_usd: float

    @property
    def hours(self) -> float:
        return self.seconds / 3600


def attempt_cost(
    events: Events, *, until: float | None = None, usd_per_h: float | None = None
) -> AttemptCost:
    """Return what one attempt cost.

    Args:
        events: the attempt's events.
        until: end of the paid time (unix time, seconds): now, for a running attempt. None means the latest event.
        usd_per_h: price to assume if the claim has none.
    """
    if not events:
        return AttemptCost(0.0, None, None)
    price = _claim(events).get("price") or {}
    claimed_price = price.get("usd_per_h")
    return AttemptCost(
        seconds=boot_s(events) + _since_claim_s(events, until),
        usd_per_h=usd_per_h if claimed_price is None else float(claimed_price),
        market=price.get("market"),
    )


def run_cost(
    attempts: Iterable[Events], *, now: float | None = None, usd_per_h: float | None = None
) -> RunCost:
    """Return what a run has cost so far.

    Args:
        attempts: the events of each attempt, oldest first.
        now: unix time, seconds, if the newest attempt is running. None counts it up to its latest event.
        usd_per_h: price to assume for attempts whose claim has none.
    """
    every = list(attempts)
    costs = [attempt_cost(events, usd_per_h=usd_per_h) for events in every[:-1]]
    costs += [attempt_cost(events, until=now, usd_per_h=usd_per_h) for events in every[-1:]]
    priced = [(cost.market, usd) for cost in costs if (usd := cost.usd) is not None]
    return RunCost(
        seconds=sum(cost.seconds for cost in costs),
        unpriced_s=sum(cost.seconds for cost in costs if cost.usd is None),
        usd=sum(usd for _, usd in priced) if priced else None,
        spot_usd=sum(usd for market, usd in priced if market == SPOT),
        on_demand_usd=sum(usd for market, usd in priced if market != SPOT),
    )


def claimed_at(events: Events) -> datetime:
    """Return when the attempt claimed the run."""
    return _time(_claim(events))


def latest_event_at(events: Events) -> datetime:
    """Return the latest time of any event; not the last event's time, because a clock may be set back."""
    return max(map(_time, events))


def boot_s(events: Events) -> float:
    """Return the paid seconds before the claim: from the machine's boot, or 0 if the claim does not record it."""
    if not events or not (booted := _claim(events).get("booted")):
        return 0.0
    return max(0.0, (claimed_at(events) - datetime.fromisoformat(booted)).total_seconds())


def run_age_h(attempts: Sequence[Events], now: datetime) -> float:
    """Return the hours since the first claim.

    The result is never less than the attempts' own hours, because this machine's clock may be behind theirs.
    """
    claims = [_time(event) for events in attempts for event in of_kind(events, "claimed")]
    if not claims:
        return 0.0
    own_s = sum(_since_claim_s(events) for events in attempts if events)
    return max((now - claims[0]).total_seconds(), own_s) / 3600


def limit_usage(limits: Limits, *, usd: float, hours: float) -> list[Limit]:
    """Return the usage of each limit that is set.

    Args:
        limits: the run's limits.
        usd: dollars spent by all attempts.
        hours: hours since the first claim.
    """
    usages: list[Limit] = []
    if limits.budget_usd is not None:
        usages.append(Limit("budget", limits.budget_usd, usd))
    if limits.deadline_h is not None:
        usages.append(Limit("deadline", limits.deadline_h, hours))
    return usages


def exhausted_limit(
    attempts: Sequence[Events], limits: Limits, now: datetime, *, boot_usd: float = 0.0
) -> Limit | None:
    """Return the limit that leaves nothing for another attempt, or None.

    A run stops shortly before it reaches a limit, to have time to save. So a limit at which the run stopped counts as
    exhausted, and so does any lower one.

    Args:
        attempts: the events of each attempt, oldest first.
        limits: the run's limits.
        now: the current time.
        boot_usd: what the boot of the next attempt's machine has cost already.
    """
    stopped_at = {
        event["what"]: event["limit"] for events in attempts[-1:] for event in of_kind(events, "stopped")
    }
    usd = (run_cost(attempts).usd or 0.0) + boot_usd
    for usage in limit_usage(limits, usd=usd, hours=run_age_h(attempts, now)):
        if usage.share >= 1.0 or usage.of <= stopped_at.get(usage.what, 0.0):
            return usage
    return None


def _since_claim_s(events: Events, until: float | None = None) -> float:
    end = latest_event_at(events).timestamp() if until is None else until
    return max(0.0, end - claimed_at(events).timestamp())


def _claim(events: Events) -> Event:
    return next(iter(of_kind(events, "claimed")), events[0])


def _time(event: Event) -> datetime:
    return datetime.fromisoformat(event["time"])
