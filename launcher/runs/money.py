"""What a run has cost: each attempt's hours at its own price. The one place where dollars are counted.

An attempt is counted from its claim, or from its machine's boot where the claim tells of that, to what was heard of it
last. The minutes until the machine is given back are paid too, but no run knows of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from launcher.runs.read import Attempt, Run

SPOT, ON_DEMAND = "spot", "on demand"


class Paid(NamedTuple):
    """What an attempt has cost."""

    seconds: float
    usd_per_h: float | None
    """Of all its nodes; None if nobody knows, or if nobody rents them."""
    market: str | None
    """`spot`, `on demand`, or None."""

    @property
    def usd(self) -> float | None:
        return None if self.usd_per_h is None else self.usd_per_h * self.seconds / 3600


class Bill(NamedTuple):
    """What a run has cost over all its attempts."""

    seconds: float
    """Of all attempts, also of those whose price is not known."""
    unpriced_s: float
    """Of those whose price is not known."""
    usd: float | None
    """None if no attempt has a price."""
    spot_usd: float
    on_demand_usd: float


def paid(attempt: Attempt, *, until: float | None = None, usd_per_h: float | None = None) -> Paid:
    """What an attempt has cost.

    Args:
        attempt: as its events tell it.
        until: unix time, seconds: now, for one that is at work; None: its last event.
        usd_per_h: for an attempt that does not know its price.
    """
    price = attempt.claim.get("price") or {}
    own = price.get("usd_per_h")
    return Paid(attempt.paid_s(until), usd_per_h if own is None else float(own), price.get("market"))


def bill(run: Run, *, now: float | None = None, usd_per_h: float | None = None) -> Bill:
    """What a run has cost so far.

    Args:
        run: as its bucket tells it.
        now: unix time, seconds, if its newest attempt is at work; None counts that one to its last event too.
        usd_per_h: for attempts that do not know their price.
    """
    newest = run.attempts[-1].number if run.attempts else 0
    return summed(
        paid(attempt, until=now if attempt.number == newest else None, usd_per_h=usd_per_h)
        for attempt in run.attempts
    )


def summed(parts: Iterable[Paid]) -> Bill:
    """Of several attempts. What is not said to be spot counts as on demand."""
    every = list(parts)
    priced = [(part, part.usd) for part in every]
    known = [(part.market, usd) for part, usd in priced if usd is not None]
    return Bill(
        seconds=sum(part.seconds for part in every),
        unpriced_s=sum(part.seconds for part, usd in priced if usd is None),
        usd=sum(usd for _, usd in known) if known else None,
        spot_usd=sum(usd for market, usd in known if market == SPOT),
        on_demand_usd=sum(usd for market, usd in known if market != SPOT),
    )
