"""A run's budget and deadline while an attempt is at work: warned of, and then a notice like any other.

The notice comes early enough for the save that it asks for to be inside the limit, as far as earlier saves tell
how long one takes.
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
    "the budget of ${budget:,.2f} cannot be watched on this machine: nobody knows its price"
    " (AEOLUS_USD_PER_H says it of a machine of one's own)"
)
UNCOUNTED = "{hours:.2f} h of earlier attempts have no price, and do not count against the budget"


class Teller(Protocol):
    """Who is told, and knows how long a save takes."""

    def warned(self, message: str) -> None: ...
    def limit(self, limit: Limit, share: float, *, usd: float, hours: float) -> None: ...
    def stopped(self, limit: Limit, where: str, *, usd: float, hours: float) -> None: ...
    def save_s(self) -> float: ...


class BudgetWatch:
    """What is spent of the limits: by earlier attempts as their events tell it, by this one as its clock runs.

    This attempt is timed by a clock that nobody sets, so that the wall clock may jump meanwhile.
    """

    def __init__(
        self,
        limits: Limits,
        tell: Teller,
        *,
        claimed: Event,
        earlier: Callable[[], Sequence[Events]] = tuple,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Right after the claim.

        Args:
            limits: the run's.
            tell: who is told.
            claimed: this attempt's claim: its price, and its machine's boot, which a budget counts and a deadline not.
            earlier: the earlier attempts' events; asked for only if there are limits.
            now: the wall clock.
            clock: seconds, by a clock that nobody sets.
        """
        self._limits = limits
        self._tell = tell
        self._usd_per_h = usd_per_h = (claimed.get("price") or {}).get("usd_per_h")
        self._clock = clock
        self._claimed_at = clock()
        self._told: set[tuple[str, float]] = set()
        attempts = earlier() if limits else ()
        before = accounting.run_cost(attempts)
        boot_usd = accounting.attempt_cost([claimed]).usd or 0.0
        self._usd_before = (before.usd or 0.0) + boot_usd
        self._age_before_h = accounting.run_age_h(attempts, now())
        self.reached: Limit | None = None
        """The limit that ended this attempt, or that left it nothing."""
        if limits.budget_usd is not None and usd_per_h is None:
            tell.warned(UNPRICED.format(budget=limits.budget_usd))
        if limits.budget_usd is not None and before.unpriced_s:
            tell.warned(UNCOUNTED.format(hours=before.unpriced_s / 3600))
        if limits and (gone := accounting.exhausted_limit(attempts, limits, now(), boot_usd=boot_usd)):
            self._reach(gone)

    @property
    def usd(self) -> float:
        """Spent so far by all attempts."""
        return self._usd_before + (self._usd_per_h or 0.0) * self._own_h

    @property
    def hours(self) -> float:
        """Since the first attempt's claim."""
        return self._age_before_h + self._own_h

    def check(self, notice: Notice) -> None:
        """Warn of what is nearly used up; give notice in time to save before it is. Cheap enough for every poll."""
        if not self._limits or self.reached or notice.given:
            return
        reserve_h = self._tell.save_s() / 3600
        now = accounting.limit_usage(self._limits, usd=self.usd, hours=self.hours)
        then = accounting.limit_usage(
            self._limits, usd=self.usd + (self._usd_per_h or 0.0) * reserve_h, hours=self.hours + reserve_h
        )
        for each, saved in zip(now, then, strict=True):
            if each.share >= WARN_AT or saved.share >= 1.0:
                self._say(each, WARN_AT)
            if saved.share >= 1.0 and not self.reached:
                self._reach(each)
                notice.give(each.what)

    def report_stop(self, where: str) -> None:
        """Tell the attempt's end.

        Args:
            where: where it stopped: "at step 10".
        """
        assert self.reached  # noqa: S101 (asked for by who has looked)
        self._tell.stopped(self.reached, where, usd=self.usd, hours=self.hours)

    @property
    def _own_h(self) -> float:
        return (self._clock() - self._claimed_at) / 3600

    def _reach(self, limit: Limit) -> None:
        self.reached = limit
        self._say(limit, 1.0)

    def _say(self, limit: Limit, share: float) -> None:
        """Once of each."""
        if (limit.what, share) not in self._told:
            self._told.add((limit.what, share))
            self._tell.limit(limit, share, usd=self.usd, hours=self.hours)
