"""`python -m launcher doctor`: what a run needs, what of it is there, and how to get the rest."""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Self

import click

from launcher import completion
from trainer.errors import ExitCode

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud
    from launcher.doctor.check import Finding

STYLES = {"ok": "green", "missing": "red", "failed": "red", "skipped": "dim"}


@click.command(short_help="See whether all is there that a run needs.")
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--infra",
    multiple=True,
    metavar="CLOUD",
    shell_complete=completion.infra,
    help="Where; `local`: this machine.  [default: settings]",
)
@click.option("--checkpoints", metavar="URI", help="Where runs live.  [default: settings]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_obj
def doctor(
    cloud: Cloud | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    infra: tuple[str, ...],
    checkpoints: str | None,
    as_json: bool,
) -> int:
    """See whether everything is there that a run needs; with RECIPE, also its model and its data.

    Exit codes: 0 all that is needed is there; 2 something is missing, and what.
    """
    from launcher import render
    from launcher.cloud.skypilot import SkyPilot
    from launcher.doctor.checks import look

    out = sys.stdout  # SkyPilot's adapter sends what is printed to stderr for as long as it is at work
    with _Progress() as progress:
        found = look(
            recipe,
            overrides=overrides,
            infra=infra,
            checkpoints=checkpoints,
            environ=os.environ,
            cloud=cloud or SkyPilot(),
            done=progress.done,
            began=progress.began,
        )
    ready = not any(each.in_the_way for each in found)
    if as_json:
        checks = [each.model_dump(mode="json") for each in found]
        click.echo(render.to_json({"ready": ready, "checks": checks}), file=out)
    else:
        _print(found, out, ready=ready)
    return ExitCode.DONE if ready else ExitCode.USAGE


def _print(found: list[Finding], out: IO[str], *, ready: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from launcher import terminal

    console = terminal.stdout(out)
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in found:
        style = STYLES[each.status] if each.needed or each.status == "ok" else "yellow"
        optional = "" if each.needed or each.status in ("ok", "skipped") else " (not needed)"
        table.add_row(Text(each.status, style=style), each.name, Text(each.said + optional))
        if each.hint and each.status != "ok":
            table.add_row("", "", Text(each.hint, style="dim"))
    console.print(table, soft_wrap=console.is_terminal)
    missing = [each.name for each in found if each.in_the_way]
    console.print(
        "all that is needed is there" if ready else f"not ready: {', '.join(dict.fromkeys(missing))}"
    )


class _Progress:
    """How many of the checks have ended, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from launcher import terminal

        console = terminal.stderr()
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[last]}", markup=False),
        )
        self._progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False
        )
        self._task = self._progress.add_task("checks", total=None, last="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def began(self, count: int) -> None:
        self._progress.update(self._task, total=count)

    def done(self, name: str) -> None:
        self._progress.update(self._task, advance=1, last=name)
