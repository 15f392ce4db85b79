"""Views of a run that is followed: its log and, on a terminal, a progress line below it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from launcher.render import duration
from launcher.runs.run import RunHistory
from trainer.metrics import LOSS, REWARD_ACCURACY


class ProgressView(Protocol):
    """Shows a run that is followed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def line(self, text: str) -> None:
        """Show a line of the run's log."""

    def note(self, text: str) -> None:
        """Show a message of the launcher."""

    def show(self, run: RunHistory) -> None:
        """Show the progress of the run."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Draw nothing while the user is asked."""


class LineView:
    """Passes log lines and messages on unchanged, in the order in which they come."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave nothing behind: lines only."""

    def line(self, text: str) -> None:
        self._say(text)

    def note(self, text: str) -> None:
        self._say(text)

    def show(self, run: RunHistory) -> None:
        """Show nothing: the log has the progress."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield


class PlainView(LineView):
    """Writes lines to pipes and log files; the launcher's messages carry its name."""

    def __init__(self, console: Console) -> None:
        super().__init__(lambda text: console.print(Text(text), soft_wrap=True))
        self._console = console

    def note(self, text: str) -> None:
        self.line(f"launcher: {text}")


class LiveView(PlainView):
    """For terminals: the log scrolls above one line with the progress of the run."""

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
    """Return the view that the console can show."""
    return LiveView(console) if console.is_terminal else PlainView(console)


def facts(run: RunHistory) -> str:
    """Return the text behind the bar: time left, newest metrics, commits, preemptions."""
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
