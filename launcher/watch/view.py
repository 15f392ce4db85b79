"""A run on a terminal: how far it is, what it costs, its curves, its attempts."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.render import duration, list_table, usd
from launcher.report.curves import half_width, running_mean
from launcher.report.series import Panel, panels
from launcher.watch.braille import BrailleCurve, plot
from launcher.watch.state import RunSnapshot
from launcher.watch.text import pairs

LAST_ATTEMPTS = 8
ROWS = 30
"""Where nothing is known of the terminal."""
LEAST_ROWS, MOST_ROWS = 6, 32
"""Of a curve, with its title; of all of them."""
SIDE_BY_SIDE = 100
"""Characters from which on the curves stand beside each other."""
STYLES = {"running": "green", "done": "green", "failed": "red", "preempted": "yellow", "recovering": "yellow"}
COLUMNS = ("attempt", "where", "market", ">$/h", ">time", ">$", ">steps", "end")


class RunView:
    """Drawn anew for the size that the terminal has."""

    def __init__(self, seen: RunSnapshot, *, hint: str = "", rows: int | None = None) -> None:
        self._seen = seen
        self._hint = hint
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, width = self._seen, options.max_width
        above = Group(head(seen), bar(seen, width), facts(seen))
        fault = [Text(f"not all is known: {seen.fault}", style="yellow")] if seen.fault else []
        hint = [Text(self._hint, style="dim")] if self._hint else []
        below = Group(attempts(seen), *fault, *hint)
        free = (self._rows or options.height or ROWS) - 1
        free -= sum(len(console.render_lines(part, options.reset_height())) for part in (above, below))
        yield above
        if free > 0:
            yield Text()
        yield curves(panels(seen.run), width, min(free, MOST_ROWS))
        yield below


def head(seen: RunSnapshot) -> Text:
    one = seen.account
    state = Text(f" {seen.state} ", style=f"bold reverse {STYLES.get(seen.state, 'cyan')}")
    newest = one.attempts[-1] if one.attempts else None
    about = " · ".join(
        filter(None, (one.method.upper(), one.recipe, newest.shape if newest else "", seen.said))
    )
    return Text(one.run, style="bold").append(" ").append_text(state).append(f"  {about}", style="dim")


def bar(seen: RunSnapshot, width: int) -> RenderableType:
    run = seen.run
    if not run.total_steps:
        return Text("no step yet: setting up" if seen.at_work else "no step yet", style="dim")
    words = [f"step {run.step:,} of {run.total_steps:,}", f"{run.step / run.total_steps:.0%}"]
    if (left := seen.left_s) is not None:
        words.append(f"{duration(left)} left, until {datetime.fromtimestamp(seen.now + left):%H:%M}")  # noqa: DTZ006 (the clock on the user's wall)
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        ProgressBar(total=run.total_steps, completed=run.step, width=max(10, min(40, width // 3))),
        Text("  ".join(words)),
    )
    return grid


def facts(seen: RunSnapshot) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs(seen):
        grid.add_row(name, Text(value))
    return grid


def curves(shown: list[Panel], width: int, rows: int) -> RenderableType:
    """As many as there is room for in so many rows, beside each other where it is wide."""
    beside = width >= SIDE_BY_SIDE and len(shown) > 1
    if beside and rows >= LEAST_ROWS:
        grid = Table.grid(padding=(0, 4, 0, 0))
        grid.add_row(*(_curves(panel, (width - 4) // 2, min(rows, MOST_ROWS // 2)) for panel in shown))
        return grid
    fitting = shown[: rows // LEAST_ROWS] if rows > 0 else []
    return Group(*(_curves(panel, width, rows // len(fitting)) for panel in fitting))


def _curves(panel: Panel, width: int, rows: int) -> Group:
    """A line of words, then the dots."""
    drawn = []
    for curve in panel.curves:
        if curve.kind == "train":
            drawn.append(BrailleCurve(running_mean(curve.points, half_width(len(curve.points))), "cyan"))
        if curve.kind == "test":
            drawn.append(BrailleCurve(curve.points, "bold yellow", "●"))
    title = Text(panel.title.lower(), style="bold").append("  train ").append("⠒⠒", style="cyan")
    if any(line.sign and line.points for line in drawn):
        title.append("  test ").append("●", style="bold yellow")
    if panel.losses:
        title.append("  ┊ an attempt ended", style="dim")
    return Group(
        title,
        *plot(
            drawn,
            width=width,
            height=rows - 1,
            last_step=panel.last_step,
            ends=[step for step, _ in panel.losses],
        ),
    )


def attempts(seen: RunSnapshot) -> Table:
    shown = seen.account.attempts[-LAST_ATTEMPTS:]
    rows = []
    for one in shown:
        price = "" if one.usd_per_h is None else f"{one.usd_per_h:.2f}"
        steps = f"{one.start_step:,} → {one.last_step:,}"
        ended = one.how if one.how != "at work" or seen.at_work else "not heard of since"
        rows.append(
            (
                str(one.number),
                one.where,
                one.market or "",
                price,
                duration(one.hours.paid_s),
                usd(one.usd),
                steps,
                ended,
            )
        )
    return list_table(COLUMNS, rows)
