"""How a watched run is shown: as a full-screen view with curves, or as one line of text."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher.render import duration, list_table, usd
from launcher.report.curves import Panel, half_width, panels, running_mean
from launcher.report.tables import gib
from launcher.runs.account import RUNNING, ending
from launcher.watch.braille import BrailleCurve, plot
from launcher.watch.state import RunSnapshot
from trainer.events import of_kind
from trainer.metrics import LOSS, REWARD_ACCURACY

LAST_ATTEMPTS = 8
"""Attempts in the table; older ones are left out."""
ROWS = 30
"""Height that is assumed if the terminal's height is unknown."""
LEAST_ROWS, MOST_ROWS = 6, 32
"""Fewest rows of one curve with its title, and most rows of all curves together."""
SIDE_BY_SIDE = 100
"""In a terminal of at least this width in characters the curves are drawn side by side."""
STYLES = {"running": "green", "done": "green", "failed": "red", "preempted": "yellow", "recovering": "yellow"}
COLUMNS = ("attempt", "where", "market", ">$/h", ">time", ">$", ">steps", "end")
NO_EVENTS = "no events yet"


class RunView:
    """A rich renderable that fits the size of the terminal."""

    def __init__(self, snapshot: RunSnapshot, *, hint: str = "", rows: int | None = None) -> None:
        self._snapshot = snapshot
        self._hint = hint
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot, width = self._snapshot, options.max_width
        above = Group(head(snapshot), bar(snapshot, width), facts(snapshot))
        fault = [Text(f"incomplete: {snapshot.fault}", style="yellow")] if snapshot.fault else []
        hint = [Text(self._hint, style="dim")] if self._hint else []
        below = Group(attempts(snapshot), *fault, *hint)
        # The curves take the rows that are left, so that the table below them is always visible.
        free = (self._rows or options.height or ROWS) - 1
        free -= sum(len(console.render_lines(part, options.reset_height())) for part in (above, below))
        yield above
        if free > 0:
            yield Text()
        yield curves(panels(snapshot.run), width, min(free, MOST_ROWS))
        yield below


def line(snapshot: RunSnapshot) -> str:
    """Return the state of the run in one line, for a log."""
    run, account = snapshot.run, snapshot.account
    if not run.attempts:
        return f"{snapshot.state}: {NO_EVENTS}"
    last = run.steps[-1] if run.steps else {}
    words = [
        snapshot.state,
        f"attempt {run.attempts[-1].number} {ending(run, run.attempts[-1])}",
        f"step {run.step} of {run.total_steps}" if run.total_steps else "",
        f"loss {loss}" if (loss := LOSS.text(last)) else "",
        f"committed {run.commits[-1]}" if run.commits else "",
        f"{usd(account.usd)}" if account.usd is not None else "",
        f"{duration(snapshot.left_s)} left" if snapshot.left_s else "",
    ]
    return "  ".join(filter(None, words))


def pairs(snapshot: RunSnapshot) -> list[tuple[str, str]]:
    """Return the facts of the moment, as names and values."""
    account, run = snapshot.account, snapshot.run
    if not run.attempts:
        return [("state", f"{snapshot.state}: {NO_EVENTS}")]
    newest = account.attempts[-1]
    last = run.steps[-1] if run.steps else {}
    price = f"{newest.usd_per_h:.2f} $/h" if newest.usd_per_h is not None else "price unknown"
    pace = [
        f"{newest.step_s:.3g} s per step" if newest.step_s else "",
        f"{newest.tokens_per_s:,.0f} tokens/s" if newest.tokens_per_s else "",
    ]
    metrics = [
        f"loss {loss}" if (loss := LOSS.text(last)) else "",
        f"test loss {loss}" if (loss := LOSS.test_text(account.test)) else "",
        f"test accuracy {accuracy}" if (accuracy := REWARD_ACCURACY.test_text(account.test)) else "",
    ]
    found = [
        ("node", ", ".join(filter(None, (newest.where, newest.market, price, newest.fit)))),
        ("dollars", dollars(snapshot)),
        ("last commit", commit(snapshot)),
        ("pace", ", ".join(filter(None, pace)) or "no step yet"),
        ("now", ", ".join(filter(None, metrics)) or "no step yet"),
    ]
    if newest.gpu.measured_gib:
        peak, predicted, capacity = (
            gib(value) for value in (newest.gpu.measured_gib, newest.gpu.predicted_gib, newest.gpu.there_gib)
        )
        found.append(("GPU memory", f"peak {peak} GiB, {predicted} predicted, {capacity} available"))
    return found


def dollars(snapshot: RunSnapshot) -> str:
    """Return the dollars so far, their share of the budget, the plan, and the expected total at this pace."""
    account = snapshot.account
    if account.usd is None:
        return "price unknown"
    budget = (account.limits or {}).get("budget_usd")
    planned = (account.plan or {}).get("usd")
    words = [f"{usd(account.usd)} so far"]
    if budget:
        words.append(f"{account.usd / budget:.0%} of the budget of {usd(budget)}")
    if planned:
        words.append(f"{usd(planned)} planned")
    newest = account.attempts[-1]
    if (left := snapshot.left_s) is not None and newest.usd_per_h is not None:
        words.append(f"about {usd(account.usd + left / 3600 * newest.usd_per_h)} at the end")
    return ", ".join(words)


def commit(snapshot: RunSnapshot) -> str:
    """Return the newest commit, its age, and the steps since: the work that a preemption would lose now."""
    run = snapshot.run
    if not run.commits:
        return "none yet"
    newest = run.commits[-1]
    if run.state == "done":
        return f"step {newest:,}"
    events = [event for event in of_kind(run.events, "committed") if event["step"] == newest]
    age = ""
    if events:
        committed = datetime.fromisoformat(events[-1]["time"]).timestamp()
        age = f", {duration(snapshot.now - committed)} ago"
    return f"step {newest:,}{age}, {run.step - newest:,} steps since"


def head(snapshot: RunSnapshot) -> Text:
    account = snapshot.account
    state = Text(f" {snapshot.state} ", style=f"bold reverse {STYLES.get(snapshot.state, 'cyan')}")
    shape = account.attempts[-1].shape if account.attempts else ""
    about = " · ".join(filter(None, (account.method.upper(), account.recipe, shape, snapshot.held_by)))
    return Text(account.run, style="bold").append(" ").append_text(state).append(f"  {about}", style="dim")


def bar(snapshot: RunSnapshot, width: int) -> RenderableType:
    run = snapshot.run
    if not run.total_steps:
        return Text("no step yet: setting up" if snapshot.at_work else "no step yet", style="dim")
    words = [f"step {run.step:,} of {run.total_steps:,}", f"{run.step / run.total_steps:.0%}"]
    if (left := snapshot.left_s) is not None:
        end = datetime.fromtimestamp(snapshot.now + left)  # noqa: DTZ006 (the user's local time)
        words.append(f"{duration(left)} left, until {end:%H:%M}")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        ProgressBar(total=run.total_steps, completed=run.step, width=max(10, min(40, width // 3))),
        Text("  ".join(words)),
    )
    return grid


def facts(snapshot: RunSnapshot) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs(snapshot):
        grid.add_row(name, Text(value))
    return grid


def curves(shown: list[Panel], width: int, rows: int) -> RenderableType:
    """Return as many panels as fit into `rows`, side by side on a wide terminal."""
    beside = width >= SIDE_BY_SIDE and len(shown) > 1
    if beside and rows >= LEAST_ROWS:
        grid = Table.grid(padding=(0, 4, 0, 0))
        grid.add_row(*(_curves(panel, (width - 4) // 2, min(rows, MOST_ROWS // 2)) for panel in shown))
        return grid
    fitting = shown[: rows // LEAST_ROWS] if rows > 0 else []
    return Group(*(_curves(panel, width, rows // len(fitting)) for panel in fitting))


def attempts(snapshot: RunSnapshot) -> Table:
    rows = []
    for one in snapshot.account.attempts[-LAST_ATTEMPTS:]:
        silent = one.how == RUNNING and not snapshot.at_work
        rows.append(
            (
                str(one.number),
                one.where,
                one.market or "",
                "" if one.usd_per_h is None else f"{one.usd_per_h:.2f}",
                duration(one.hours.paid_s),
                usd(one.usd),
                f"{one.start_step:,} → {one.last_step:,}",
                "no event since" if silent else one.how,
            )
        )
    return list_table(COLUMNS, rows)


def _curves(panel: Panel, width: int, rows: int) -> Group:
    """Return a title line with the key, and below it the curves in braille dots."""
    drawn = []
    for curve in panel.curves:
        if curve.kind == "train":
            drawn.append(BrailleCurve(running_mean(curve.points, half_width(len(curve.points))), "cyan"))
        if curve.kind == "test":
            drawn.append(BrailleCurve(curve.points, "bold yellow", "●"))
    title = Text(panel.title.lower(), style="bold").append("  train ").append("⠒⠒", style="cyan")
    if any(curve.sign and curve.points for curve in drawn):
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
