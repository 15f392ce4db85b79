"""The commands: parse, call one function, print. Whatever weighs something is imported where it is used."""

from __future__ import annotations

import difflib
import errno
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from launcher import completion, terminal
from launcher.checkpoints.cli import checkpoints
from launcher.doctor.cli import doctor
from launcher.image.cli import build
from launcher.plan.cli import plan
from launcher.report.cli import report
from launcher.runs.cli import runs
from launcher.submit.cli import submit
from launcher.watch.cli import watch
from trainer.errors import ExitCode, UserError

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud, JobStatus
    from launcher.registry.known import Known, Local, Submitted
    from launcher.runs.run import Reader
    from launcher.submit.status import RowDict

CONTEXT = {"help_option_names": ["-h", "--help"]}
COLUMNS = {
    "run": "run",
    "where": "where",
    "state": "state",
    "step": "step",
    "committed": "last commit",
    "attempts": "attempts",
    "usd": "$ so far",
}
"""Of `status`: the row's key, and its title."""
NOT_OURS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""What a folder refuses with, such as a home that belongs to nobody."""


def main(arguments: Sequence[str] | None = None, *, cloud: Cloud | None = None) -> NoReturn:
    """Run a command. The one place where a UserError becomes text.

    Args:
        arguments: as typed; None: of this process.
        cloud: a stand-in for SkyPilot.
    """
    terminal.take_any_text(sys.stdout)
    try:
        code = cli.main(arguments, prog_name="launcher", standalone_mode=False, obj=cloud)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("aborted", err=True)
        code = 1
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = ExitCode.USAGE
    except OSError as error:
        if error.errno not in NOT_OURS:
            raise
        click.echo(f"error: cannot use {error.filename or 'a file'}: {error.strerror}", err=True)
        code = ExitCode.USAGE
    sys.exit(code or 0)


class Commands(click.Group):
    """A command that nobody knows is answered with the nearest one, as newer versions of click do by themselves."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.commands, n=1)
            if near and "Did you mean" not in error.format_message():
                error.message += f" Did you mean '{near[0]}'?"
            raise


@click.group(cls=Commands, context_settings=CONTEXT)
def cli() -> None:
    """Post-training that survives losing its machine."""


cli.add_command(build)
cli.add_command(checkpoints)
cli.add_command(completion.completion)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(report)
cli.add_command(runs)
cli.add_command(submit)
cli.add_command(watch)


@cli.command(short_help="The runs that were started from here.")
@click.option("--all", "everything", is_flag=True, help="Also what SkyPilot has from elsewhere.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list on stdout.")
@click.pass_obj
def status(cloud: Cloud | None, everything: bool, as_json: bool) -> None:
    """The runs that were started or submitted from this machine, the latest first.

    Dollars are the attempts' hours at the price of each one's machine, else of the machine that was chosen.
    """
    from launcher import render
    from launcher.submit import status as standing

    rows = standing.table(terminal.state_folder(), _cloud(cloud), now=time.time(), everything=everything)
    if as_json:
        click.echo(render.to_json(rows))
        return
    if not rows:
        terminal.stdout().print("no run was started on this machine yet")
        return
    terminal.stdout().print(render.list_table(tuple(COLUMNS.values()), map(_cells, rows)))
    for fault in dict.fromkeys(str(row["error"]) for row in rows if row["error"]):
        click.echo(f"not all is known: {fault}", err=True)


@cli.command(short_help="A run's log.")
@click.argument("run", shell_complete=completion.runs)
@click.option("-f", "--follow", is_flag=True, help="Stay until it ends.")
@click.option("--checkpoints", metavar="URI", help="Tells runs of one name apart.")
@click.pass_obj
def logs(cloud: Cloud | None, run: str, follow: bool, checkpoints: str | None) -> None:
    """Print the log of RUN: the supervisor's, by way of SkyPilot if it runs elsewhere."""
    from launcher.local import submit as machine
    from launcher.registry import known

    found = _find(run, checkpoints)
    if isinstance(found, known.Local):
        machine.print_log(found.home, click.echo, follow=follow)
        return
    there = _standing(found, _cloud(cloud))
    if there is None:
        raise UserError(
            f"SkyPilot has no {found.record.kind} {found.record.name} any more, nor its log",
            hint=f"its events are in {found.record.checkpoints}/{run}/events",
        )
    out = sys.stdout  # the adapter sends what SkyPilot itself prints to stderr, and this is not that
    _cloud(cloud).logs(there, lambda line: click.echo(line, file=out), follow=follow)


@cli.command(short_help="Stop a run: it saves and commits first.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--checkpoints", metavar="URI", help="Tells runs of one name apart.")
@click.pass_obj
def cancel(cloud: Cloud | None, run: str, checkpoints: str | None) -> int:
    """Stop RUN: it saves, uploads and commits first, as far as the machine's notice allows."""
    from launcher.registry import known
    from launcher.submit import launch

    found = _find(run, checkpoints)
    if isinstance(found, known.Local):
        return _cancel_here(found)
    there = _standing(found, _cloud(cloud))
    if there is None or not there.at_work:
        click.echo(f"{run} is not at work: {there.said if there else 'SkyPilot has nothing of it'}")
        return ExitCode.DONE
    click.echo(f"cancelling {run} ({there.kind} {there.name}): it saves, uploads and commits first")
    left = launch.cancel(there, _cloud(cloud), _reader(found), lambda line: click.echo(line, err=True))
    if there.kind == "cluster" and _standing(found, _cloud(cloud)):  # Slurm's goes with its job
        click.echo(f"its cluster is still there, and paid: `launcher down {run}` gives it back")
    place = f"step {max(left.commits)}" if left.commits else "the beginning: nothing was committed yet"
    click.echo(f"cancelled; the command that submitted it goes on from {place}")
    return ExitCode.DONE


@cli.command(short_help="Give back what a run has rented.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--checkpoints", metavar="URI", help="Tells runs of one name apart.")
@click.pass_context
def down(context: click.Context, run: str, checkpoints: str | None) -> int:
    """Give back what RUN has rented; what is at work is cancelled first."""
    from launcher.registry import known

    found = _find(run, checkpoints)
    context.invoke(cancel, run=run, checkpoints=checkpoints)
    if isinstance(found, known.Submitted) and found.record.kind == "cluster":
        cloud = _cloud(context.obj)
        if _standing(found, cloud):
            cloud.down(found.record.name, lambda line: click.echo(line, err=True))
        click.echo(f"the cluster {found.record.name} is gone")
    return ExitCode.DONE


def _cancel_here(found: Local) -> int:
    from launcher.local import follow, process
    from launcher.local import submit as machine

    supervisor = process.attach(found.home)
    if supervisor is None:
        click.echo(f"{found.record.run_id} is not at work on this machine")
        return ExitCode.DONE
    click.echo(
        f"cancelling {found.record.run_id} (pid {supervisor.pid}): it saves, uploads and commits first"
    )
    follow.cancel(found.home, supervisor)
    machine.print_log(found.home, click.echo, follow=True, last_lines=0)
    click.echo("cancelled; the command that started it goes on from the newest commit")
    return ExitCode.DONE


def _find(run: str, checkpoints: str | None) -> Known:
    from launcher.registry import known
    from trainer.bucket.address import canonical

    address = canonical(checkpoints, Path.cwd()) if checkpoints else None
    return known.find(terminal.state_folder(), run, address)


def _standing(found: Submitted, cloud: Cloud) -> JobStatus | None:
    from launcher.cloud.protocol import find

    return find(cloud, found.record.name, found.record.kind)


def _reader(found: Submitted) -> Reader:
    from launcher.runs.run import Reader
    from trainer.bucket import open_run

    return Reader(open_run(found.record.checkpoints, found.record.run_id), found.record.run_id)


def _cloud(given: Cloud | None) -> Cloud:
    from launcher.cloud.skypilot import SkyPilot

    return given or SkyPilot()


def _cells(row: RowDict) -> list[str]:
    shown = {**row, "usd": f"{row['usd']:.2f}" if row["usd"] is not None else None}
    return [str(shown[column]) if shown[column] is not None else "" for column in COLUMNS]
