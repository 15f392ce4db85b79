"""`python -m launcher plan`: which machines fit a recipe, with expected hours and dollars; it rents nothing."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from launcher import completion
from trainer.errors import ExitCode, UserError
from trainer.options import DurationParam

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.plan.rank import Plan, PlanRequest, PlanRow, Rejected

TOP = 12
"""Options that are shown without `--all`."""
TOP_REJECTED = 6
"""Rejections that are shown without `--all`."""


@click.command(short_help="Show where a recipe fits, with hours and cost.")
@click.argument("recipe", default="dpo_full", shell_complete=completion.recipes)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--gpus",
    metavar="NAME[:N]",
    shell_complete=completion.gpus,
    help="GPUs per node, such as A100:8.  [default: all types]",
)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Number of nodes.")
@click.option(
    "--spot/--on-demand", default=None, help="Only spot or only on-demand machines.  [default: both]"
)
@click.option(
    "--infra",
    multiple=True,
    metavar="CLOUD[/REGION]",
    shell_complete=completion.infra,
    help="Cloud or region; can be repeated.  [default: from settings, else gcp and lambda]",
)
@click.option(
    "--budget", type=click.FloatRange(min=0, min_open=True), metavar="USD", help="Maximum expected cost."
)
@click.option("--deadline", type=DurationParam(), metavar="TIME", help="Maximum expected time: 90m, 24h, 2d.")
@click.option(
    "--by", type=click.Choice(["dollars", "hours"]), default="dollars", show_default=True, help="Sort order."
)
@click.option("--rows", type=click.IntRange(min=1), help="Rows of the data set, if its size is unknown.")
@click.option("--all", "everything", is_flag=True, help="Show all options and all rejections.")
@click.option("--refresh", is_flag=True, help="Request new prices even if the cached ones are fresh.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
def plan(recipe: str, overrides: tuple[str, ...], **options: Any) -> int:
    """Rank all machines that could train RECIPE (a file, or a name such as zephyr-7b/dpo_full).

    Exit codes: 0 an option fits; 2 none fits, or the recipe or an option is invalid.
    """
    from launcher import render, terminal

    terminal.refuse_empty(options)
    planned = _make_plan(recipe, overrides, options)
    if options["as_json"]:
        click.echo(render.to_json(as_dict(planned)))
    else:
        _print(planned, everything=options["everything"])
    return ExitCode.DONE if planned.chosen else ExitCode.USAGE


def _make_plan(recipe: str, overrides: tuple[str, ...], options: dict[str, Any]) -> Plan:
    from launcher import settings
    from launcher.plan.plan import make_plan
    from trainer.recipe import load

    return make_plan(
        load(recipe, overrides).recipe,
        _request(options),
        infra=options["infra"] or settings.load(os.environ).infra,
        now=datetime.now(UTC),
        rows=options["rows"],
        refresh=options["refresh"],
    )


def _request(options: dict[str, Any]) -> PlanRequest:
    from launcher.plan.rank import PlanRequest, parse_gpus

    accelerator, count = parse_gpus(options["gpus"]) if options["gpus"] else (None, None)
    return PlanRequest(
        accelerator=accelerator,
        count=count,
        nodes=options["nodes"],
        spot=options["spot"],
        budget_usd=options["budget"],
        deadline_h=options["deadline"],
        by=options["by"],
    )


def as_dict(planned: Plan) -> dict[str, Any]:
    """Return the plan for `--json`: every row, with the terms of its memory and of its time."""
    rows = [{**row.model_dump(mode="json"), "fit_words": row.fit.words()} for row in planned.rows]
    return {**planned.model_dump(mode="json"), "rows": rows, "chosen": rows[0] if rows else None}


def _print(planned: Plan, *, everything: bool) -> None:
    from launcher import terminal
    from launcher.plan.plan import suggest

    console = terminal.stdout()
    rows = planned.rows if everything else planned.rows[:TOP]
    if rows:
        console.print(_table(rows))
        if hidden := len(planned.rows) - len(rows):
            console.print(f"and {hidden} more options: --all", style="dim")
    _print_rejected(planned.rejected, console, everything=everything)
    if planned.chosen is None:
        raise UserError(f"{planned.recipe}: {planned.why}", hint=suggest(planned.rejected))
    console.print(f"\n[bold]chosen[/] {planned.why}", soft_wrap=True)
    for reason in planned.chosen.fit.reasons:
        console.print(f"  {reason}", style="dim", soft_wrap=True, markup=False)
    console.print(f"data   {planned.workload.source}", style="dim", soft_wrap=True, markup=False)
    console.print(f"prices {planned.prices}", style="dim", markup=False)
    for note in planned.notes:
        console.print(f"       {note}", style="dim", soft_wrap=True, markup=False)


def _table(rows: tuple[PlanRow, ...]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("shape", "where", "market"):
        table.add_column(name, no_wrap=True)
    table.add_column("fit", overflow="fold", min_width=24)
    for name in ("GPU GiB", "host GiB", "hours", "$/h", "$"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_row(*_cells(row), style="bold" if number == 0 else None)
    return table


def _cells(row: PlanRow) -> list[str]:
    from trainer.hardware import usable_gib

    return [
        str(row.shape),
        f"{row.offer.infra}/{row.offer.region}",
        "spot" if row.spot else "on demand",
        row.fit.words(),
        f"{row.fit.gpu.gib:.0f} of {usable_gib(row.shape) or 0:.0f}",
        f"{row.fit.host.gib:.0f} of {row.shape.host_memory_gib:.0f}",
        f"{row.hours:.1f}",
        f"{row.usd_per_h:.2f}",
        f"{row.usd:,.0f}",
    ]


def _print_rejected(rejected: tuple[Rejected, ...], console: Console, *, everything: bool) -> None:
    if not rejected:
        return
    console.print("\n[bold]rejected[/]")
    for rejection in rejected if everything else rejected[:TOP_REJECTED]:
        console.print(f"  {rejection.what}: {rejection.why}", style="dim", soft_wrap=True, markup=False)
    if not everything and (hidden := len(rejected) - TOP_REJECTED) > 0:
        console.print(f"  and {hidden} more: --all", style="dim")
