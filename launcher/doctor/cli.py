"""`python -m launcher doctor`: check that everything a run requires is set up, and report how to fix the rest."""

from __future__ import annotations

import os
import sys
from typing import IO, TYPE_CHECKING, Self

import click

from launcher import completion
from trainer.errors import ExitCode

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud
    from launcher.doctor.findings import Finding

STYLES = {"ok": "green", "missing": "red", "failed": "red", "skipped": "dim"}


@click.command(short_help="Check everything that a run requires.")
@click.argument("recipe", required=False, shell_complete=completion.recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--infra",
    multiple=True,
    metavar="CLOUD",
    shell_complete=completion.infra,
    help="Where the run is to run; `local` is this machine.  [default: from settings]",
)
@click.option("--checkpoints", metavar="URI", help="Folder of runs.  [default: from settings]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
@click.pass_obj
def doctor(
    cloud: Cloud | None,
    recipe: str | None,
    overrides: tuple[str, ...],
    infra: tuple[str, ...],
    checkpoints: str | None,
    as_json: bool,
) -> int:
    """Check everything that a run requires; with RECIPE, also its model and its data.

    Exit codes: 0 everything required works; 2 something required is missing or fails.
    """
    from launcher import render
    from launcher.cloud.skypilot import SkyPilot
    from launcher.doctor.checks import check_all

    out = sys.stdout  # while SkyPilot's adapter runs, it redirects sys.stdout to stderr
    with _Progress() as progress:
        found = check_all(
            recipe,
            overrides=overrides,
            infra=infra,
            checkpoints=checkpoints,
            environ=os.environ,
            cloud=cloud or SkyPilot(),
            on_start=progress.start,
            on_done=progress.advance,
        )
    ready = not any(finding.blocks_run for finding in found)
    if as_json:
        checks = [finding.model_dump(mode="json", by_alias=True) for finding in found]
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
    for finding in found:
        style = STYLES[finding.status] if finding.needed or finding.status == "ok" else "yellow"
        optional = "" if finding.needed or finding.status in ("ok", "skipped") else " (optional)"
        table.add_row(Text(finding.status, style=style), finding.name, Text(finding.detail + optional))
        if finding.hint and finding.status != "ok":
            table.add_row("", "", Text(finding.hint, style="dim"))
    console.print(table, soft_wrap=console.is_terminal)
    blocking = [finding.name for finding in found if finding.blocks_run]
    console.print(
        "ready: everything required works" if ready else f"not ready: {', '.join(dict.fromkeys(blocking))}"
    )


class _Progress:
    """A progress bar of the ended checks; it shows nothing if stderr is not a terminal."""

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

    def start(self, count: int) -> None:
        self._progress.update(self._task, total=count)

    def advance(self, name: str) -> None:
        self._progress.update(self._task, advance=1, last=name)
