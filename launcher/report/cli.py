"""`python -m launcher report`: what a run cost, compared with its plan or with another run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import completion, terminal

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.report.tables import ReportTable
    from launcher.runs.account import Account
    from launcher.runs.run import RunHistory


@click.command(short_help="What a run cost, or two runs compared.")
@click.argument("runs", nargs=-1, required=True, metavar="RUN [OTHER]", shell_complete=completion.runs)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write one HTML page to FILE.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; for two runs, a list of two.")
@click.option(
    "--checkpoints",
    metavar="URI",
    help="Folder or bucket of the runs.  [default: where they were started, else settings]",
)
def report(runs: tuple[str, ...], html: Path | None, as_json: bool, checkpoints: str | None) -> None:
    """Report what RUN cost: dollars, hours, goodput, lost steps and memory, compared with the prediction of `plan`.

    RUN is a run's name or its address, such as s3://bucket/prefix/RUN. With OTHER, the two runs are compared.
    """
    from launcher import render
    from launcher.registry.find import place
    from launcher.runs.account import account

    if len(runs) > 2:
        raise click.UsageError(f"{len(runs)} runs were given; `report` takes one or two")
    where = {"state": terminal.state_folder(), "environ": os.environ, "cwd": Path.cwd()}
    found = [place(run, checkpoints, **where).read() for run in runs]  # type: ignore[arg-type]
    accounts = [account(run) for run in found]
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(_page(found, accounts), encoding="utf-8")
    if as_json:
        objects = [one.as_dict() for one in accounts]
        click.echo(render.to_json(objects[0] if len(objects) == 1 else objects))
    else:
        _print(accounts)
    if html:
        click.echo(f"page: {html}", err=True)


def _page(runs: list[RunHistory], accounts: list[Account]) -> str:
    from datetime import UTC, datetime

    from launcher.report import html

    made = f"as of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if len(runs) == 1:
        return html.run_page(runs[0], accounts[0], made=made)
    return html.comparison_page((runs[0], runs[1]), (accounts[0], accounts[1]), made=made)


def _print(accounts: list[Account]) -> None:
    from launcher import render
    from launcher.report import tables

    console = terminal.stdout()
    if len(accounts) == 2:
        _table(console, tables.comparison((accounts[0], accounts[1])))
        return
    (one,) = accounts
    facts = [(name, f"{value}  {note}".rstrip()) for name, value, note in tables.figures(one)]
    console.print(render.facts_table([("state", one.state), *facts, *tables.other_facts(one)], title=one.run))
    _table(console, tables.attempts(one))
    _table(console, tables.time_parts(one))
    if against := tables.plan_comparison(one):
        _table(console, against)


def _table(console: Console, rows: ReportTable) -> None:
    from launcher import render

    console.print()
    console.print(rows.caption, style="bold", markup=False)
    console.print(render.list_table(rows.columns, rows.rows))
