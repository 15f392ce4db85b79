"""Single keys from a terminal, without an Enter."""

from __future__ import annotations

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from typing import Protocol


class Keys(Protocol):
    """Where keys come from."""

    def wait(self, seconds: float) -> str:
        """The key that was pressed within that time, or nothing."""


class NoKeys:
    """Nobody is there."""

    def wait(self, seconds: float) -> str:
        time.sleep(seconds)
        return ""


class TerminalKeys:
    """Of stdin, which is a terminal."""

    def wait(self, seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""


@contextlib.contextmanager
def keys() -> Iterator[Keys]:
    """Keys come as they are pressed, and are not shown, until it ends; Ctrl-C stays what it is."""
    if not sys.stdin.isatty():
        yield NoKeys()
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield TerminalKeys()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
