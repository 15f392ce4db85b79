"""What a machine hears while it brings a checkpoint or a model: how far it is, and that it need not go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from trainer.supervisor.preemption import Notice

log = logging.getLogger(__name__)
TELL_EVERY_S = 20.0


class Given(Exception):
    """Notice was given: what is being brought here is of no use here."""


class Bringing:
    """Told the bytes of each piece, on whichever thread has moved it; says how many they are, now and then."""

    def __init__(
        self, notice: Notice, *, every_s: float = TELL_EVERY_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._notice = notice
        self._every_s = every_s
        self._clock = clock
        self._adding = threading.Lock()
        self._began = self._told = clock()
        self._bytes = 0

    def __call__(self, count: int) -> None:
        """Raises `Given` once notice was given, which ends the transfer."""
        if self._notice.given:
            raise Given
        with self._adding:
            self._bytes += count
            now = self._clock()
            if now - self._told < self._every_s:
                return
            self._told = now
        rate = self._bytes / max(now - self._began, 1e-9)
        log.info("brought %.1f GB so far, %.0f MB/s", self._bytes / 1e9, rate / 1e6)
