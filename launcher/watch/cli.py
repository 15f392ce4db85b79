"""`python -m launcher watch`: follow a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import completion, terminal

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud
    from launcher.watch.state import RunSnapshot


@click.command(short_help="Follow a run: progress, curves, dollars.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--once", is_flag=True, help="Show the run once and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and exit.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.2),
    metavar="SECONDS",
    help="Seconds between two reads.  [default: 1 for a folder, else 5]",
)
@click.option(
    "--checkpoints",
    metavar="URI",
    help="Folder or bucket of the run.  [default: where it was started, else settings]",
)
@click.pass_obj
def watch(
    cloud: Cloud | None, run: str, once: bool, as_json: bool, every: float | None, checkpoints: str | None
) -> None:
    """Follow RUN: progress, curves, dollars, attempts. The run is only read; leaving with q or Ctrl-C does not stop it.

    RUN is a run's name or its address, such as s3://bucket/prefix/RUN. If the output is not a terminal, a line is
    printed whenever something has changed.
    """
    from launcher.registry.find import place, started_here
    from launcher.watch import follow
    from launcher.watch.follow import NoKeys, keys
    from launcher.watch.state import Source
    from launcher.watch.view import ROWS, RunView
    from trainer.bucket.address import folder_of

    found = place(run, checkpoints, state=terminal.state_folder(), environ=os.environ, cwd=Path.cwd())
    if not started_here(found, terminal.state_folder()):
        found.read()  # refuses an unknown name instead of waiting for it
    source = Source(found, cloud, state=terminal.state_folder())
    console = terminal.stdout()
    every_s = every or (5.0 if folder_of(found.checkpoints) is None else 1.0)
    if once or as_json:
        snapshot = source.look(time.time())
    elif console.is_terminal:
        with keys() as pressed:
            snapshot = follow.live(source.look, console, pressed, every_s=every_s, clock=time.time)
    else:
        follow.lines(source.look, console, NoKeys(), every_s=every_s, clock=time.time)
        return
    if as_json:
        _print_json(snapshot)
    else:
        console.print(RunView(snapshot, rows=ROWS))


def _print_json(snapshot: RunSnapshot) -> None:
    from launcher import render

    state: dict[str, Any] = {
        "state": snapshot.state,
        "at_work": snapshot.at_work,
        "held_by": snapshot.held_by,
        "left_s": snapshot.left_s,
        "silent_s": snapshot.silent_s,
        "fault": snapshot.fault,
    }
    click.echo(render.to_json({**snapshot.account.as_dict(), **state}))
