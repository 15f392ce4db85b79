"""The attempt's pulse: writes its events to the bucket and sees whether the run is still its own."""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from trainer.bucket.attempts import Attempt
from trainer.errors import Superseded, UserError
from trainer.events import EventLog

log = logging.getLogger(__name__)


class Heartbeat:
    """A thread, because a store that is slow or down must never hold up the supervisor."""

    def __init__(
        self, events: EventLog, attempt: Attempt, *, every_s: float = 1.0, check_s: float = 30.0
    ) -> None:
        self._events = events
        self._attempt = attempt
        self._every_s = every_s
        self._check_s = check_s
        self._ended = threading.Event()
        self._complained_at = -60.0
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.superseded: Superseded | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is left; the events of an attempt that ends must be in the bucket."""
        self._ended.set()
        self._thread.join()
        self._try_to_write(now=True)

    def _beat(self) -> None:
        checked_at = time.monotonic()
        while not self._ended.wait(self._every_s) and self.superseded is None:
            self._try_to_write(now=False)
            if time.monotonic() - checked_at >= self._check_s:
                checked_at = time.monotonic()
                self._check()

    def _check(self) -> None:
        try:
            self._attempt.check()
        except Superseded as error:
            self.superseded = error
        except UserError as error:
            self._complain("cannot see whether the run is still ours", error)

    def _try_to_write(self, *, now: bool) -> None:
        try:
            self._events.flush(now=now)
        except UserError as error:  # the events stay in memory for the next beat
            self._complain("cannot write the run's events", error)

    def _complain(self, what: str, error: UserError) -> None:
        """Once a minute, not once a try."""
        if time.monotonic() - self._complained_at >= 60.0:
            self._complained_at = time.monotonic()
            log.warning("%s: %s", what, error.message)
