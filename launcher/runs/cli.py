"""`python -m launcher runs`: the runs of a bucket."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import terminal

if TYPE_CHECKING:
    from launcher.runs.listing import RunListing

COLUMNS = ("run", "state", ">step", ">loss", ">last commit", ">attempts", ">$", "last event")


@click.command(short_help="List the runs in a bucket.")
@click.option(
    "--checkpoints",
    metavar="URI",
    help="gs://…, s3://…, or a local folder.  [default: settings]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def runs(checkpoints: str | None, as_json: bool) -> None:
    """List the runs in the bucket, the latest first, including those started from other machines."""
    from launcher import render, settings
    from launcher.runs.listing import listing
    from trainer.bucket.address import canonical

    address = canonical(checkpoints or settings.load(os.environ).checkpoints, Path.cwd())
    now = time.time()
    rows = listing(address, now=now)
    if as_json:
        click.echo(render.to_json([row.as_dict() for row in rows]))
        return
    if not rows:
        terminal.stdout().print(
            f"no run is in {address}; `launcher status` lists the runs that were started from this machine",
            markup=False,
        )
        return
    terminal.stdout().print(render.list_table(COLUMNS, (_cells(row, now) for row in rows)))
    for row in rows:
        if row.error:
            click.echo(f"{row.run}: {row.error}", err=True)


def _cells(row: RunListing, now: float) -> list[str]:
    from launcher.render import ago
    from trainer.metrics import LOSS

    of = f" of {row.total_steps:,}" if row.total_steps else ""
    return [
        row.run,
        row.state,
        f"{row.step:,}{of}" if row.step is not None else "",
        format(row.loss, LOSS.format) if row.loss is not None else "",
        f"{row.committed:,}" if row.committed is not None else "",
        str(row.attempts) if row.attempts is not None else "",
        f"{row.usd:,.2f}" if row.usd is not None else "",
        ago(now - row.last) if row.last is not None else "",
    ]
