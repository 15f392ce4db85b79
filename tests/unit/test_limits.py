"""BudgetWatch warns of a limit and gives notice before it is used up. The tests move the clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.unit.test_spent import BEGIN, at, attempt
from trainer.accounting import Limit, Limits
from trainer.events import Event
from trainer.supervisor.budget import BudgetWatch
from trainer.supervisor.preemption import Notice


class RecordingReporter:
    """Records what is reported. A save takes `save_s` seconds."""

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


class WatchedAttempt:
    """A BudgetWatch of an attempt that was claimed at `claimed_h`, with clocks that the test sets."""

    def __init__(
        self,
        limits: dict[str, Any],
        *earlier: list[Event],
        usd_per_h: float | None = 10.0,
        claimed_h: float = 0.0,
        save_s: float = 0.0,
        boot_h: float = 0.0,
    ) -> None:
        self.reporter = RecordingReporter(save_s)
        self.notice = Notice()
        self.seconds = 1000.0
        self.wall = at(claimed_h)
        self.watch = BudgetWatch(
            Limits(**limits),
            self.reporter,
            claimed=attempt(claimed_h, usd_per_h=usd_per_h, boot_h=boot_h)[0],
            earlier=lambda: earlier,
            now=lambda: self.wall,
            clock=lambda: self.seconds,
        )

    def after(self, hours: float) -> bool:
        """Check the limits so many hours after the claim. Return whether notice was given."""
        self.seconds = 1000.0 + hours * 3600
        self.watch.check(self.notice)
        return self.notice.given


def test_a_budget_causes_a_warning_and_then_a_notice() -> None:
    """The warning comes at 80 % and the notice at 100 %. Each is reported once."""
    watched = WatchedAttempt({"budget_usd": 20})
    assert not watched.after(1.5)
    assert watched.reporter.limits == []
    assert not watched.after(1.6)
    assert not watched.after(1.9)
    assert watched.reporter.limits == [("budget", 0.8)]
    assert watched.after(2.0)
    assert watched.notice.source == "budget"
    watched.after(3.0)
    assert watched.reporter.limits == [("budget", 0.8), ("budget", 1.0)]
    watched.watch.report_stop("saved at step 3")
    assert watched.reporter.ended == [("budget", "saved at step 3")]


def test_the_last_save_fits_within_the_limit() -> None:
    """The notice comes earlier by the time that a save takes, for both limits."""
    for limits in ({"budget_usd": 20}, {"deadline_h": 2}):
        watched = WatchedAttempt(limits, save_s=360)
        assert not watched.after(1.89)
        assert watched.after(1.91)


def test_a_save_that_takes_longer_than_the_whole_limit_leaves_nothing() -> None:
    """The attempt stops immediately rather than too late."""
    assert WatchedAttempt({"deadline_h": 1}, save_s=7200).after(0)


def test_earlier_attempts_count() -> None:
    """The budget includes their dollars, and the deadline counts from the first attempt's claim."""
    spent = [attempt(0, 1), attempt(5, 5.5)]
    watched = WatchedAttempt({"budget_usd": 20}, *spent, claimed_h=6)
    assert watched.watch.usd == pytest.approx(15)
    assert not watched.after(0.49)
    assert watched.after(0.5)
    late = WatchedAttempt({"deadline_h": 10}, *spent, claimed_h=6)
    assert not late.after(3.9)
    assert late.after(4.0)


def test_a_used_up_limit_is_detected_at_the_claim() -> None:
    """The attempt then ends before anything is fetched or started."""
    watched = WatchedAttempt({"budget_usd": 10}, attempt(0, 1), claimed_h=2)
    assert watched.watch.reached
    assert watched.reporter.limits == [("budget", 1.0)]
    assert not WatchedAttempt({"budget_usd": 11}, attempt(0, 1), claimed_h=2).watch.reached


def test_a_budget_counts_from_the_machine_s_boot_and_a_deadline_from_the_claim() -> None:
    """After half an hour of booting at $10/h, a budget of $20 lasts 1.5 h, and a deadline of 2 h lasts 2 h."""
    watched = WatchedAttempt({"budget_usd": 20}, boot_h=0.5)
    assert watched.watch.usd == pytest.approx(5)
    assert not watched.after(1.49)
    assert watched.after(1.5)
    late = WatchedAttempt({"deadline_h": 2}, boot_h=0.5)
    assert not late.after(1.99)
    assert late.after(2.0)


def test_a_boot_that_uses_up_the_budget_is_detected_at_the_claim() -> None:
    """The cost of earlier attempts and of their boots counts too."""
    earlier = attempt(0, 1, boot_h=0.5)
    assert WatchedAttempt({"budget_usd": 20}, earlier, claimed_h=2, boot_h=0.5).watch.reached
    assert not WatchedAttempt({"budget_usd": 21}, earlier, claimed_h=2, boot_h=0.5).watch.reached


def test_a_wall_clock_that_jumps_during_the_attempt_changes_nothing() -> None:
    """A jump of a year forward does not end the run, and a jump back does not extend it."""
    for jump in (timedelta(days=365), -timedelta(days=365)):
        watched = WatchedAttempt({"deadline_h": 2})
        watched.wall = BEGIN + jump
        assert not watched.after(1.9)
        assert watched.after(2.0)


def test_a_clock_behind_the_earlier_attempts_does_not_extend_the_deadline() -> None:
    """The clock of a new machine may be wrong by hours."""
    watched = WatchedAttempt({"deadline_h": 3}, attempt(0, 2), claimed_h=-50)
    assert watched.watch.hours == pytest.approx(2)
    assert watched.after(1.0)


def test_a_machine_without_a_price_warns_that_its_budget_is_not_enforced() -> None:
    """The deadline is still enforced."""
    watched = WatchedAttempt({"budget_usd": 1, "deadline_h": 5}, usd_per_h=None)
    assert "AEOLUS_USD_PER_H" in watched.reporter.warnings[0]
    assert not watched.after(4.9)
    assert watched.after(5.0)
    assert watched.notice.source == "deadline"


def test_earlier_attempts_without_a_price_cause_a_warning() -> None:
    """No cost is invented for them, and the user learns that they do not count."""
    watched = WatchedAttempt({"budget_usd": 20}, attempt(0, 3, usd_per_h=None), claimed_h=4)
    assert "3.00 h of earlier attempts have no known price" in watched.reporter.warnings[0]
    assert watched.watch.usd == 0
    assert not watched.after(1.9)


def test_a_preempted_attempt_is_not_stopped_by_a_limit() -> None:
    """The first notice counts: the run is recovered, and the next attempt counts what was spent."""
    watched = WatchedAttempt({"budget_usd": 1})
    watched.notice.give("SIGTERM")
    watched.after(50)
    assert watched.notice.source == "SIGTERM"
    assert watched.watch.reached is None


def test_earlier_events_are_read_only_if_there_are_limits() -> None:
    """A run without limits causes no requests to its store."""
    watch = BudgetWatch(
        Limits(),
        RecordingReporter(),
        claimed=attempt(0)[0],
        earlier=lambda: pytest.fail("asked"),
        now=lambda: datetime.now(UTC),
        clock=lambda: 0.0,
    )
    watch.check(Notice())
    assert watch.reached is None
