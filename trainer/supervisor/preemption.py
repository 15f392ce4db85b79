"""How a machine says that it is about to go, as one flag that the supervisor reads."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from trainer.supervisor.window import Window


class Notice:
    """Set once, by the first sign that the machine goes; later signs change nothing.

    SIGTERM is what SkyPilot, Slurm and `docker stop` send; SIGINT is a person's Ctrl-C; what GCE says
    is `trainer.supervisor.metadata`'s to hear.
    """

    def __init__(self) -> None:
        self.window: Window | None = None
        """How long a notice is on this machine; None where nobody says."""
        self._given = threading.Event()
        self._source = ""

    @property
    def given(self) -> bool:
        return self._given.is_set()

    @property
    def source(self) -> str:
        """What gave the notice: "SIGTERM", "SIGINT", "GCE preemption"."""
        return self._source

    def give(self, source: str) -> None:
        if not self._given.is_set():
            self._source = source
            self._given.set()

    def wait(self, timeout_s: float) -> bool:
        """Sleep for `timeout_s` seconds, or until notice is given; whether it was."""
        return self._given.wait(timeout_s)

    def listen(self) -> None:
        """Take SIGTERM and SIGINT for this process; main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.give(signal.Signals(number).name)
