"""Looks at a run until it is over or nobody wants to see more: drawn on a terminal, told in lines elsewhere."""

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
from launcher.watch.text import line
from launcher.watch.view import RunView
from trainer.errors import UserError

KEY_S = 0.2
"""Seconds that a key may wait, and between two drawings."""
HINT = "q or Ctrl-C leaves; the run goes on"
QUIT = ("q", "Q", "\x04", "\x1b")


class Look(Protocol):
    def __call__(self, now: float) -> RunSnapshot: ...


class Looker(threading.Thread):
    """Looks again and again; whoever leaves does not wait for a look that is under way."""

    def __init__(self, look: Look, *, every_s: float, clock: Callable[[], float]) -> None:
        """Looks once at once; raises what that look does."""
        super().__init__(name="looker", daemon=True)
        self._look = look
        self._every_s = every_s
        self._clock = clock
        self._left = threading.Event()
        self.seen = look(clock())

    def leave(self) -> None:
        self._left.set()

    def run(self) -> None:
        while not self._left.wait(self._every_s):
            try:
                self.seen = self._look(self._clock())
            except UserError as error:  # the run does not need us to see it; the next look may
                self.seen = replace(self.seen, fault=error.message)


def live(
    look: Look, console: Console, keys: Keys, *, every_s: float, clock: Callable[[], float]
) -> RunSnapshot:
    """Until the run is over or a key says so; the last that was seen."""
    looker = Looker(look, every_s=every_s, clock=clock)
    looker.start()
    with Live(console=console, screen=True, auto_refresh=False) as screen, suppress(KeyboardInterrupt):
        while not looker.seen.over:
            screen.update(RunView(looker.seen, hint=HINT, rows=console.height), refresh=True)
            if keys.wait(KEY_S) in QUIT:
                break
    looker.leave()
    return looker.seen


def lines(
    look: Look, console: Console, keys: Keys, *, every_s: float, clock: Callable[[], float]
) -> RunSnapshot:
    """A line whenever something has changed, until the run is over or a Ctrl-C."""
    seen, said = look(clock()), ""
    try:
        while True:
            if (words := line(seen)) != said:
                console.print(Text(words), soft_wrap=True)
                said = words
            if seen.over:
                return seen
            keys.wait(every_s)
            try:
                seen = look(clock())
            except UserError as error:
                console.print(Text(f"cannot see the run for now: {error.message}"), soft_wrap=True)
    except KeyboardInterrupt:
        return seen


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
