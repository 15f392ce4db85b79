"""The watch over a run's limits, with clocks that a test moves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.unit.test_spent import BEGIN, at, attempt
from trainer.accounting import Limit, Limits
from trainer.events import Event
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.preemption import Notice


class Told:
    """Hears what is told, and knows how long a save takes."""

    def __init__(self, save_s: float = 0.0) -> None:
        self.seconds = save_s
        self.warnings: list[str] = []
        self.limits: list[tuple[str, float]] = []
        self.ended: list[tuple[str, str]] = []

    def warned(self, message: str) -> None:
        self.warnings.append(message)

    def limit(self, limit: Limit, share: float, *, usd: float, hours: float) -> None:
        self.limits.append((limit.what, share))

    def stopped(self, limit: Limit, where: str, *, usd: float, hours: float) -> None:
        self.ended.append((limit.what, where))

    def save_s(self) -> float:
        return self.seconds


class Site:
    """A watch over an attempt that was claimed at `claimed_h`, and its clocks."""

    def __init__(
        self,
        limits: dict[str, Any],
        *earlier: list[Event],
        usd_per_h: float | None = 10.0,
        claimed_h: float = 0.0,
        save_s: float = 0.0,
        boot_h: float = 0.0,
    ) -> None:
        self.told = Told(save_s)
        self.notice = Notice()
        self.seconds = 1000.0
        self.wall = at(claimed_h)
        self.watch = BudgetWatch(
            Limits(**limits),
            self.told,
            claimed=attempt(claimed_h, usd_per_h=usd_per_h, boot_h=boot_h)[0],
            earlier=lambda: earlier,
            now=lambda: self.wall,
            clock=lambda: self.seconds,
        )

    def after(self, hours: float) -> bool:
        """Whether there is notice, so many hours after the claim."""
        self.seconds = 1000.0 + hours * 3600
        self.watch.look(self.notice)
        return self.notice.given


def test_a_budget_is_warned_of_and_then_ends_the_attempt() -> None:
    """At four fifths, and at the whole; each is told once."""
    site = Site({"budget_usd": 20})
    assert not site.after(1.5)
    assert site.told.limits == []
    assert not site.after(1.6)
    assert not site.after(1.9)
    assert site.told.limits == [("budget", 0.8)]
    assert site.after(2.0)
    assert site.notice.source == "budget"
    site.after(3.0)
    assert site.told.limits == [("budget", 0.8), ("budget", 1.0)]
    site.watch.stopped("saved at step 3")
    assert site.told.ended == [("budget", "saved at step 3")]


def test_the_save_is_inside_the_limit() -> None:
    """Stopping begins as much earlier as a save is known to take; both limits alike."""
    for limits in ({"budget_usd": 20}, {"deadline_h": 2}):
        site = Site(limits, save_s=360)
        assert not site.after(1.89)
        assert site.after(1.91)


def test_a_save_that_takes_longer_than_the_whole_limit_leaves_nothing() -> None:
    """Then it stops at once, rather than too late."""
    assert Site({"deadline_h": 1}, save_s=7200).after(0)


def test_earlier_attempts_count() -> None:
    """Their dollars; and the deadline since the first of them was claimed."""
    spent = [attempt(0, 1), attempt(5, 5.5)]
    site = Site({"budget_usd": 20}, *spent, claimed_h=6)
    assert site.watch.usd == pytest.approx(15)
    assert not site.after(0.49)
    assert site.after(0.5)
    late = Site({"deadline_h": 10}, *spent, claimed_h=6)
    assert not late.after(3.9)
    assert late.after(4.0)


def test_what_is_spent_already_is_known_at_the_claim() -> None:
    """Before anything is fetched or started."""
    site = Site({"budget_usd": 10}, attempt(0, 1), claimed_h=2)
    assert site.watch.reached
    assert site.told.limits == [("budget", 1.0)]
    assert not Site({"budget_usd": 11}, attempt(0, 1), claimed_h=2).watch.reached


def test_a_budget_counts_from_the_machine_s_boot_and_a_deadline_from_the_claim() -> None:
    """Half an hour of booting at $10 an hour leaves an hour and a half of $20, and two hours of two."""
    site = Site({"budget_usd": 20}, boot_h=0.5)
    assert site.watch.usd == pytest.approx(5)
    assert not site.after(1.49)
    assert site.after(1.5)
    late = Site({"deadline_h": 2}, boot_h=0.5)
    assert not late.after(1.99)
    assert late.after(2.0)


def test_a_boot_that_uses_up_the_budget_is_known_at_the_claim() -> None:
    """With what earlier attempts took, their own boots included."""
    earlier = attempt(0, 1, boot_h=0.5)
    assert Site({"budget_usd": 20}, earlier, claimed_h=2, boot_h=0.5).watch.reached
    assert not Site({"budget_usd": 21}, earlier, claimed_h=2, boot_h=0.5).watch.reached


def test_a_wall_clock_that_jumps_during_the_attempt_changes_nothing() -> None:
    """Neither a year forward, which would end the run, nor back, which would keep it for ever."""
    for jump in (timedelta(days=365), -timedelta(days=365)):
        site = Site({"deadline_h": 2})
        site.wall = BEGIN + jump
        assert not site.after(1.9)
        assert site.after(2.0)


def test_a_clock_behind_the_earlier_attempts_does_not_turn_the_deadline_back() -> None:
    """A new machine's clock may be wrong by hours."""
    site = Site({"deadline_h": 3}, attempt(0, 2), claimed_h=-50)
    assert site.watch.hours == pytest.approx(2)
    assert site.after(1.0)


def test_a_machine_without_a_price_says_that_its_budget_is_not_watched() -> None:
    """Silence would be believed; the deadline is kept all the same."""
    site = Site({"budget_usd": 1, "deadline_h": 5}, usd_per_h=None)
    assert "AEOLUS_USD_PER_H" in site.told.warnings[0]
    assert not site.after(4.9)
    assert site.after(5.0)
    assert site.notice.source == "deadline"


def test_earlier_attempts_without_a_price_are_said_not_to_count() -> None:
    """Nothing is made up for them."""
    site = Site({"budget_usd": 20}, attempt(0, 3, usd_per_h=None), claimed_h=4)
    assert "3.00 h of earlier attempts have no price" in site.told.warnings[0]
    assert site.watch.usd == 0
    assert not site.after(1.9)


def test_a_machine_that_goes_anyway_is_not_stopped_for_a_limit() -> None:
    """The notice that came first stands: the run is recovered, and the next attempt knows what is spent."""
    site = Site({"budget_usd": 1})
    site.notice.give("SIGTERM")
    site.after(50)
    assert site.notice.source == "SIGTERM"
    assert site.watch.reached is None


def test_without_limits_nobody_asks_for_earlier_events() -> None:
    """A run without limits pays for no requests to its store."""
    watch = BudgetWatch(
        Limits(),
        Told(),
        claimed=attempt(0)[0],
        earlier=lambda: pytest.fail("asked"),
        now=lambda: datetime.now(UTC),
        clock=lambda: 0.0,
    )
    watch.look(Notice())
    assert watch.reached is None
