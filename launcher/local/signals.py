"""SIGINT and SIGTERM for a loop that wants to end in its own time."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Self


class Signals:
    """SIGINT and SIGTERM, kept as wishes until the loop looks; they cut its waits short."""

    def __init__(self) -> None:
        self._given: list[int] = []
        self._wake = threading.Event()

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._keep) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Whether one came within `seconds`."""
        return self._wake.wait(seconds)

    def take(self) -> int | None:
        """The one that came, once; SIGTERM before SIGINT."""
        given, self._given = self._given, []
        self._wake.clear()
        return max(given, default=None)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """While the user is asked, either is a KeyboardInterrupt, which ends the asking."""
        for number in self._before:
            signal.signal(number, signal.default_int_handler)
        try:
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._keep)

    def _keep(self, number: int, _frame: FrameType | None) -> None:
        self._given.append(number)
        self._wake.set()
