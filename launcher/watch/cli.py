"""`python -m launcher watch`: a run as it goes on."""

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


@click.command(short_help="Progress, curves, dollars of a run at work.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--once", is_flag=True, help="Show how it stands, and come back.")
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
@click.option(
    "--every",
    type=click.FloatRange(min=0.2),
    metavar="SECONDS",
    help="Between two looks.  [default: 1 for a folder, else 5]",
)
@click.option(
    "--checkpoints", metavar="URI", help="Where the run is.  [default: where it was started, else settings]"
)
@click.pass_obj
def watch(
    cloud: Cloud | None, run: str, once: bool, as_json: bool, every: float | None, checkpoints: str | None
) -> None:
    """Watch RUN: progress, curves, dollars, attempts. It is only read: leaving (q, Ctrl-C) does not touch it.

    RUN is a run's name or its address, such as s3://bucket/prefix/RUN. Elsewhere than on a terminal, a line whenever
    something has changed.
    """
    from launcher.registry.find import place, started_here
    from launcher.watch import follow
    from launcher.watch.follow import NoKeys, keys
    from launcher.watch.state import Source
    from launcher.watch.view import RunView
    from trainer.bucket.address import folder_of

    found = place(run, checkpoints, state=terminal.state_folder(), environ=os.environ, cwd=Path.cwd())
    if not started_here(found, terminal.state_folder()):
        found.read()  # a name that nobody knows is refused rather than waited for
    source = Source(found, lambda: _cloud(cloud), state=terminal.state_folder())
    console = terminal.stdout()
    every_s = every or (5.0 if folder_of(found.checkpoints) is None else 1.0)
    if once or as_json:
        seen = source.look(time.time())
    elif console.is_terminal:
        with keys() as pressed:
            seen = follow.live(source.look, console, pressed, every_s=every_s, clock=time.time)
    else:
        follow.lines(source.look, console, NoKeys(), every_s=every_s, clock=time.time)
        return
    if as_json:
        _print_json(seen)
    else:
        console.print(RunView(seen, rows=30))


def _print_json(seen: RunSnapshot) -> None:
    from launcher import render

    about: dict[str, Any] = {"state": seen.state, "at_work": seen.at_work, "held_by": seen.said}
    moment = {"left_s": seen.left_s, "silent_s": seen.silent_s, "fault": seen.fault}
    click.echo(render.to_json({**seen.account.as_dict(), **about, **moment}))


def _cloud(given: Cloud | None) -> Cloud:
    from launcher.cloud.skypilot import SkyPilot

    return given or SkyPilot()
