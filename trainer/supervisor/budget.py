"""Watches a run's budget and deadline while an attempt is running.

It warns when a limit is nearly used up, and gives notice before it is, as a preemption does. The time that earlier
saves took tells how early the notice must be for the last save to fit within the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from trainer import accounting
from trainer.accounting import Events, Limit, Limits
from trainer.events import Event
from trainer.supervisor.preemption import Notice

WARN_AT = 0.8
UNPRICED = (
    "the budget of ${budget:,.2f} cannot be enforced on this machine, because its price is unknown"
    " (set AEOLUS_USD_PER_H to the price of a machine of your own)"
)
UNCOUNTED = "{hours:.2f} h of earlier attempts have no known price and do not count against the budget"


class LimitReporter(Protocol):
    """Reports warnings and limits, and knows how long a save takes."""

    def warned(self, message: str) -> None: ...
    def limit(self, limit: Limit, share: float, *, usd: float, hours: float) -> None: ...
    def stopped(self, limit: Limit, where: str, *, usd: float, hours: float) -> None: ...
    def save_s(self) -> float: ...


class BudgetWatch:
    """Watches how much of the limits is used.

    The events of earlier attempts show what they have used. The current attempt is timed by a monotonic clock, so that
    a change of the wall clock has no effect.
    """

    def __init__(
        self,
        limits: Limits,
        reporter: LimitReporter,
        *,
        claimed: Event,
        earlier: Callable[[], Sequence[Events]] = tuple,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start to watch. Call it right after the claim.

        Args:
            limits: the limits of the run.
            reporter: reports warnings and reached limits.
            claimed: this attempt's claim. It has the price and the machine's boot time, from which on the budget
                counts. The deadline counts from the claim.
            earlier: returns the events of the earlier attempts. It is called only if there are limits.
            now: the wall clock.
            clock: the monotonic clock, in seconds.
        """
        self._limits = limits
        self._reporter = reporter
        self._usd_per_h = usd_per_h = (claimed.get("price") or {}).get("usd_per_h")
        self._clock = clock
        self._claimed_at = clock()
        self._reported: set[tuple[str, float]] = set()
        attempts = earlier() if limits else ()
        before = accounting.run_cost(attempts)
        boot_usd = accounting.attempt_cost([claimed]).usd or 0.0
        self._usd_before = (before.usd or 0.0) + boot_usd
        self._age_before_h = accounting.run_age_h(attempts, now())
        self.reached: Limit | None = None
        """The limit that is used up. None while the attempt may continue."""
        if limits.budget_usd is not None and usd_per_h is None:
            reporter.warned(UNPRICED.format(budget=limits.budget_usd))
        if limits.budget_usd is not None and before.unpriced_s:
            reporter.warned(UNCOUNTED.format(hours=before.unpriced_s / 3600))
        if limits and (exhausted := accounting.exhausted_limit(attempts, limits, now(), boot_usd=boot_usd)):
            self._reach(exhausted)

    @property
    def usd(self) -> float:
        """Dollars spent by all attempts so far."""
        return self._usd_before + (self._usd_per_h or 0.0) * self._own_h

    @property
    def hours(self) -> float:
        """Hours since the first attempt's claim."""
        return self._age_before_h + self._own_h

    def check(self, notice: Notice) -> None:
        """Warn if a limit is nearly used up. Give notice while there is still time to save within the limit.

        It is cheap enough to be called at every poll.
        """
        if not self._limits or self.reached or notice.given:
            return
        # A limit must not be exceeded by the time at which a save that begins now would end.
        reserve_h = self._reporter.save_s() / 3600
        now = accounting.limit_usage(self._limits, usd=self.usd, hours=self.hours)
        then = accounting.limit_usage(
            self._limits, usd=self.usd + (self._usd_per_h or 0.0) * reserve_h, hours=self.hours + reserve_h
        )
        for limit, after_save in zip(now, then, strict=True):
            if limit.share >= WARN_AT or after_save.share >= 1.0:
                self._report(limit, WARN_AT)
            if after_save.share >= 1.0 and not self.reached:
                self._reach(limit)
                notice.give(limit.what)

    def report_stop(self, where: str) -> None:
        """Report that the attempt has stopped because of a limit.

        Args:
            where: the point at which it stopped: "at step 10".
        """
        assert self.reached  # noqa: S101 (the caller has checked it)
        self._reporter.stopped(self.reached, where, usd=self.usd, hours=self.hours)

    @property
    def _own_h(self) -> float:
        return (self._clock() - self._claimed_at) / 3600

    def _reach(self, limit: Limit) -> None:
        self.reached = limit
        self._report(limit, 1.0)

    def _report(self, limit: Limit, share: float) -> None:
        """Report a limit once for each share."""
        if (limit.what, share) not in self._reported:
            self._reported.add((limit.what, share))
            self._reporter.limit(limit, share, usd=self.usd, hours=self.hours)
