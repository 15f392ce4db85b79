"""Hours and dollars of attempts, and the limits of a run (`trainer.accounting`)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from trainer.accounting import Limits, RunCost, exhausted_limit, limit_usage, run_age_h, run_cost
from trainer.events import Event

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def attempt(
    *hours: float, usd_per_h: float | None = 10.0, end: Event | None = None, boot_h: float = 0.0
) -> list[Event]:
    """Return events at these hours: a claim, then steps. The machine booted `boot_h` before the claim."""
    kinds = ["claimed", *["step"] * (len(hours) - 1)]
    events: list[Event] = [
        {"kind": kind, "time": (BEGIN + timedelta(hours=at)).isoformat()}
        for kind, at in zip(kinds, hours, strict=True)
    ]
    events[0]["price"] = {"usd_per_h": usd_per_h, "market": None, "cloud": None, "region": None}
    events[0] |= {"booted": at(hours[0] - boot_h).isoformat()} if boot_h else {}
    return [*events, {**events[-1], **end}] if end else events


def cost(hours: float, usd: float | None, unpriced_h: float) -> RunCost:
    """The cost of attempts that are all on demand."""
    return RunCost(hours * 3600, unpriced_h * 3600, usd, 0.0, usd or 0.0)


def at(hours: float) -> datetime:
    return BEGIN + timedelta(hours=hours)


@pytest.mark.parametrize(
    ("events", "spent"),
    [
        ([], cost(0, None, 0)),
        (attempt(0), cost(0, 0, 0)),
        (attempt(0, 1, 2), cost(2, 20, 0)),
        (attempt(0, 1.5, usd_per_h=None), cost(1.5, None, 1.5)),
        (attempt(0, 3, usd_per_h=0.0), cost(3, 0, 0)),
        (attempt(0, 2, 1), cost(2, 20, 0)),
        (attempt(5, 1), cost(0, 0, 0)),
        (attempt(1, 3, boot_h=0.5), cost(2.5, 25, 0)),
        (attempt(1, boot_h=0.5), cost(0.5, 5, 0)),
        (attempt(1, 3, boot_h=0.5, usd_per_h=None), cost(2.5, None, 2.5)),
        (attempt(5, 1, boot_h=0.5), cost(0.5, 5, 0)),
        (attempt(1, 3, boot_h=-0.5), cost(2, 20, 0)),
    ],
    ids=[
        "no events",
        "claimed alone",
        "two hours",
        "no price",
        "free",
        "set back",
        "set back before its claim",
        "from its boot",
        "its boot alone",
        "boot without a price",
        "boot, and set back before its claim",
        "a boot after its claim",
    ],
)
def test_an_attempt_costs_its_hours_at_its_own_price(events: list[Event], spent: RunCost) -> None:
    """It is paid from the claim or the boot to the latest event. A clock that is set back does not reduce the cost."""
    assert run_cost([events]) == pytest.approx(spent)


def test_claims_without_a_price_count_as_unpriced_hours() -> None:
    """A claim of an older version has no `price` field."""
    old = attempt(0, 2)
    del old[0]["price"]
    assert run_cost([old, attempt(3, 4)]) == pytest.approx(cost(3, 10, 2))


def test_a_deadline_counts_the_time_without_a_machine() -> None:
    """A deadline is wall-clock time since the first claim."""
    assert run_age_h([attempt(0, 1), attempt(5, 6)], at(8)) == pytest.approx(8)
    assert run_age_h([], at(8)) == 0


def test_a_clock_that_is_behind_does_not_extend_the_deadline() -> None:
    """The age of a run is at least the sum of its attempts' own hours."""
    assert run_age_h([attempt(0, 1), attempt(5, 7)], at(-100)) == pytest.approx(3)


@pytest.mark.parametrize("now_h", [2, -100])
def test_a_deadline_starts_with_the_first_claim_and_not_with_the_boot(now_h: float) -> None:
    """Boot time is paid, but does not count against the deadline, whether the wall clock is right or wrong."""
    assert run_age_h([attempt(0, 2, boot_h=0.5)], at(now_h)) == pytest.approx(2)


@pytest.mark.parametrize(
    ("limits", "now_h", "what"),
    [
        ({}, 1000, None),
        ({"budget_usd": 31}, 1000, None),
        ({"budget_usd": 30}, 0, "budget"),
        ({"deadline_h": 24}, 23.9, None),
        ({"deadline_h": 24}, 24, "deadline"),
        ({"budget_usd": 31, "deadline_h": 24}, 25, "deadline"),
    ],
)
def test_a_limit_is_used_up_by_all_attempts_together(
    limits: dict[str, Any], now_h: float, what: str | None
) -> None:
    """The run has two attempts of one and two hours at $10 per hour."""
    found = exhausted_limit([attempt(0, 1), attempt(5, 7)], Limits(**limits), at(now_h))
    assert (found.what if found else None) == what


@pytest.mark.parametrize(("budget", "continues"), [(24.0, False), (25.0, False), (26.0, True)])
def test_boots_use_up_a_budget(budget: float, continues: bool) -> None:
    """Boots count against the budget: 2.25 h of an earlier attempt and 0.25 h of the next one, at $10 per hour."""
    run = [attempt(0, 2, boot_h=0.25)]
    assert (exhausted_limit(run, Limits(budget_usd=budget), at(3), boot_usd=2.5) is None) is continues


@pytest.mark.parametrize(("budget", "continues"), [(9.0, False), (10.0, False), (10.5, True)])
def test_a_run_that_stopped_at_a_limit_needs_a_higher_limit(budget: float, continues: bool) -> None:
    """The rest of the limit was the reserve for saving, so the same limit counts as used up."""
    run = [attempt(0, 0.95, end={"kind": "stopped", "what": "budget", "limit": 10.0})]
    assert (exhausted_limit(run, Limits(budget_usd=budget), at(1)) is None) is continues


def test_limits_print_their_usage() -> None:
    """A budget prints dollars, a deadline hours."""
    texts = [str(usage) for usage in limit_usage(Limits(budget_usd=200, deadline_h=24), usd=160.5, hours=3)]
    assert texts == ["$160.50 of the budget of $200.00", "3.00 h of the deadline of 24 h"]
    assert not Limits()
