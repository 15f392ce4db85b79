"""Follow a run until it is over or the user leaves: as a live view on a terminal, otherwise as lines of text."""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from launcher.watch.state import RunSnapshot
from launcher.watch.view import RunView, line
from trainer.errors import UserError

KEY_S = 0.2
"""Seconds between two drawings; also the longest time until a key takes effect."""
HINT = "q or Ctrl-C leaves; the run continues"
QUIT = ("q", "Q", "\x04", "\x1b")


class Look(Protocol):
    """Reads the run once."""

    def __call__(self, now: float) -> RunSnapshot: ...


class Looker(threading.Thread):
    """A thread that reads the run repeatedly, so that a slow read does not delay the keys."""

    def __init__(self, look: Look, *, every_s: float, clock: Callable[[], float]) -> None:
        """Read the run for the first time; raises what `look` raises."""
        super().__init__(name="looker", daemon=True)
        self._look = look
        self._every_s = every_s
        self._clock = clock
        self._left = threading.Event()
        self.snapshot = look(clock())

    def leave(self) -> None:
        self._left.set()

    def run(self) -> None:
        while not self._left.wait(self._every_s):
            try:
                self.snapshot = self._look(self._clock())
            except UserError as error:  # the store may be back at the next read
                self.snapshot = replace(self.snapshot, fault=error.message)


class Keys(Protocol):
    """A source of pressed keys."""

    def wait(self, seconds: float) -> str:
        """Return the key that is pressed within `seconds`, or an empty string."""


class NoKeys:
    """Waits only: stdin is not a terminal."""

    def wait(self, seconds: float) -> str:
        time.sleep(seconds)
        return ""


class TerminalKeys:
    """Reads keys from a terminal on stdin."""

    def wait(self, seconds: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""


def live(
    look: Look, console: Console, keys: Keys, *, every_s: float, clock: Callable[[], float]
) -> RunSnapshot:
    """Draw the run until it is over or the user leaves; return the last snapshot."""
    looker = Looker(look, every_s=every_s, clock=clock)
    looker.start()
    with Live(console=console, screen=True, auto_refresh=False) as screen, suppress(KeyboardInterrupt):
        while not looker.snapshot.over:
            screen.update(RunView(looker.snapshot, hint=HINT, rows=console.height), refresh=True)
            if keys.wait(KEY_S) in QUIT:
                break
    looker.leave()
    return looker.snapshot


def lines(
    look: Look, console: Console, keys: Keys, *, every_s: float, clock: Callable[[], float]
) -> RunSnapshot:
    """Print a line whenever something changed, until the run is over or Ctrl-C; return the last snapshot."""
    snapshot, printed = look(clock()), ""
    try:
        while True:
            if (words := line(snapshot)) != printed:
                console.print(Text(words), soft_wrap=True)
                printed = words
            if snapshot.over:
                return snapshot
            keys.wait(every_s)
            try:
                snapshot = look(clock())
            except UserError as error:
                console.print(Text(f"the run cannot be read, trying again: {error.message}"), soft_wrap=True)
    except KeyboardInterrupt:
        return snapshot


@contextlib.contextmanager
def keys() -> Iterator[Keys]:
    """Yield a source of keys.

    On a terminal, keys arrive without Enter and are not echoed until the context ends. Ctrl-C still interrupts.
    """
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
