"""A transfer that somebody waits for: how far it is, how fast it goes, and Ctrl-C that ends it at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from launcher.local.signals import Signals


@contextmanager
def bar(console: Console, what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, on a terminal; what is given hears of bytes, on any thread.

    After SIGINT or SIGTERM it raises KeyboardInterrupt, so that every transfer stops with its next piece.
    """
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with Signals() as signals, progress:
        task = progress.add_task(what, total=total_bytes)

        def tell(count: int) -> None:
            if signals.wait(0):
                raise KeyboardInterrupt
            progress.advance(task, count)

        yield tell
