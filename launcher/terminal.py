"""Helpers for all commands: the state folder, stdout and stderr, and the question after Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from io import TextIOWrapper
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from rich.console import Console

Answer = Literal["detach", "cancel", "continue"]
"""The user's choice after Ctrl-C."""
WIDTH = 200
"""Characters per line if stdout is a file or a pipe; the widest table has 160."""


def state_folder() -> Path:
    """Return the folder with the records of the runs that were started or submitted from this machine."""
    from platformdirs import user_state_path

    return user_state_path("aeolus")


def take_any_text(stream: IO[str]) -> None:
    """Make the stream print a question mark for characters that the locale's encoding lacks, such as a report's bars."""
    if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def refuse_empty(options: Mapping[str, object]) -> None:
    """Raise UsageError for an option with an empty value: it is probably an unset shell variable, not the default."""
    if empty := [name for name, value in options.items() if value == ""]:
        from click import UsageError

        raise UsageError(f"--{empty[0].replace('_', '-')} is empty: check whether a shell variable is unset")


def stdout(file: IO[str] | None = None) -> Console:
    """Return a console for stdout, as wide as the terminal; lines in a file or a pipe are not wrapped at 80 characters.

    Args:
        file: the stream; None means the current `sys.stdout`.
    """
    from rich.console import Console

    console = Console(file=file, highlight=False)
    return console if console.is_terminal else Console(file=file, highlight=False, width=WIDTH)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def ask() -> Answer:
    """Ask the user whether Ctrl-C means to detach, to cancel or to continue."""
    answers: dict[str, Answer] = {"d": "detach", "c": "cancel"}
    try:
        typed = input(
            "\n[d]etach: training continues in the background; [c]ancel: save and stop; anything else: continue > "
        )
    except EOFError:
        return "continue"
    return answers.get(typed.strip().lower()[:1], "continue")


class Signals:
    """Records SIGINT and SIGTERM until the loop asks for them; a signal ends the loop's current wait."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._wake = threading.Event()

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether a signal has arrived."""
        return self._wake.wait(seconds)

    def take(self) -> int | None:
        """Return the signal that arrived and forget it; SIGTERM goes before SIGINT."""
        received, self._received = self._received, []
        self._wake.clear()
        return max(received, default=None)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Turn either signal into KeyboardInterrupt while the user is asked, so that it ends the question."""
        for number in self._before:
            signal.signal(number, signal.default_int_handler)
        try:
            yield
        finally:
            for number in self._before:
                signal.signal(number, self._record)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        self._wake.set()
