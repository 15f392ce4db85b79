"""What is shown while a run is followed: its log and, on a terminal, a line that is drawn over."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from launcher.render import duration
from launcher.runs.run import RunHistory
from trainer.metrics import LOSS, REWARD_ACCURACY


class ProgressView(Protocol):
    """Where a follower tells what happens."""

    def line(self, text: str) -> None:
        """A line of the supervisor's log."""

    def note(self, text: str) -> None:
        """A word of the launcher's own."""

    def show(self, run: RunHistory) -> None:
        """How the run stands."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """The terminal is left alone, so that the user can be asked."""


class PlainView:
    """For pipes and log files: lines only, in the order in which they come."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing was drawn."""

    def line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(Text(f"launcher: {text}"), soft_wrap=True)

    def show(self, run: RunHistory) -> None:
        """The log tells it."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield


class LiveView(PlainView):
    """For terminals: the log scrolls above one line that says how far the run is."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("run", total=None, facts="starting")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)

    def note(self, text: str) -> None:
        self._console.print(Text(text, style="bold"), soft_wrap=True)

    def show(self, run: RunHistory) -> None:
        self._progress.update(self._task, completed=run.step, total=run.total_steps, facts=facts(run))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._progress.stop()
        try:
            yield
        finally:
            self._progress.start()


def view_on(console: Console) -> LiveView | PlainView:
    """The view that the console can show."""
    return LiveView(console) if console.is_terminal else PlainView(console)


def facts(run: RunHistory) -> str:
    """The words behind the bar: time left, newest metrics, commits, preemptions."""
    if not run.attempts:
        return "starting"
    newest = run.attempts[-1]
    left = newest.step_s * ((run.total_steps or newest.step) - newest.step)
    last = run.steps[-1] if run.steps else {}
    words = [
        f"{duration(left)} left" if left else "",
        f"loss {loss}" if (loss := LOSS.text(last)) else "",
        f"accuracy {accuracy}" if (accuracy := REWARD_ACCURACY.text(last)) else "",
        f"committed {run.commits[-1]}" if run.commits else "nothing committed yet",
        f"{run.preemptions} preempted" if run.preemptions else "",
    ]
    return "  ".join(filter(None, words))
