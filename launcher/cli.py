"""The command line: each command parses its options, calls one function and prints.

Slow imports are inside the functions, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
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
    from launcher.registry.submitted import StartedRun
    from launcher.runs.run import RunHistory
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
"""Columns of `status`: the key of the row, and the title."""
USER_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
)
"""Errors of the file system that the user can fix, such as a home folder without write access."""


def main(arguments: Sequence[str] | None = None, *, cloud: Cloud | None = None) -> NoReturn:
    """Run a command and exit. A UserError becomes text here, and nowhere else.

    Args:
        arguments: the words after `launcher`; None: those of this process.
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
        if error.errno not in USER_ERRNOS:
            raise
        click.echo(f"error: cannot use {error.filename or 'a file'}: {error.strerror}", err=True)
        code = ExitCode.USAGE
    sys.exit(code or 0)


class Commands(click.Group):
    """A group that suggests the nearest command for an unknown one, as newer versions of click do."""

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
    """Post-training that survives the loss of its machine."""


cli.add_command(build)
cli.add_command(checkpoints)
cli.add_command(completion.completion)
cli.add_command(doctor)
cli.add_command(plan)
cli.add_command(report)
cli.add_command(runs)
cli.add_command(submit)
cli.add_command(watch)


@cli.command(short_help="List the runs that were started from here.")
@click.option(
    "--all", "everything", is_flag=True, help="Include jobs that were submitted to SkyPilot from elsewhere."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_obj
def status(cloud: Cloud | None, everything: bool, as_json: bool) -> None:
    """List the runs that were started or submitted from this machine, the latest first.

    The cost is each attempt's hours at the price of its machine, else at the price of the planned machine.
    """
    from launcher import render
    from launcher.submit.status import table

    rows = table(terminal.state_folder(), cloud, now=time.time(), everything=everything)
    if as_json:
        click.echo(render.to_json(rows))
        return
    if not rows:
        terminal.stdout().print("no run was started on this machine yet")
        return
    terminal.stdout().print(render.list_table(tuple(COLUMNS.values()), map(_cells, rows)))
    for fault in dict.fromkeys(str(row["error"]) for row in rows if row["error"]):
        click.echo(f"incomplete: {fault}", err=True)


@cli.command(short_help="Print the log of a run.")
@click.argument("run", shell_complete=completion.runs)
@click.option("-f", "--follow", is_flag=True, help="Continue until the run ends.")
@click.option("--checkpoints", metavar="URI", help="Folder of runs, if several runs have this name.")
@click.pass_obj
def logs(cloud: Cloud | None, run: str, follow: bool, checkpoints: str | None) -> None:
    """Print the log of RUN's supervisor."""
    record, backend, status = _find(run, checkpoints, cloud)
    if status is None:
        raise UserError(
            f"SkyPilot no longer has the {record.kind} {record.name} or its log",
            hint=f"its events are in {record.checkpoints}/{run}/events",
        )
    out = sys.stdout  # kept before the backend redirects what SkyPilot prints to stderr
    backend.logs(status, lambda line: click.echo(line, file=out), follow=follow)


@cli.command(short_help="Stop a run: it saves and commits first.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--checkpoints", metavar="URI", help="Folder of runs, if several runs have this name.")
@click.pass_obj
def cancel(cloud: Cloud | None, run: str, checkpoints: str | None) -> int:
    """Stop RUN. It saves, uploads and commits first, if the machine's notice is long enough."""
    from launcher.registry.find import place_of, status_of
    from launcher.submit import follow

    record, backend, status = _find(run, checkpoints, cloud)
    if status is None or not status.at_work:
        click.echo(f"{run} is not running: {status.raw_status if status else 'SkyPilot has no job of it'}")
        return ExitCode.DONE
    click.echo(f"cancelling {run} ({status.label}): it saves, uploads and commits first")
    place = place_of(record)
    step = "the newest commit"
    if record.kind == "local":
        follow.cancel_local(status, backend, click.echo)
        # The run is cancelled even if its bucket cannot be read from here.
        with contextlib.suppress(UserError):
            step = _newest_step(place.reader().read())
    else:
        left = follow.cancel(status, backend, place.reader(), lambda line: click.echo(line, err=True))
        # Slurm's cluster ends with its job; others stay up.
        if record.kind == "cluster" and status_of(record, terminal.state_folder(), cloud):
            click.echo(f"its cluster is still up and costs money: `launcher down {run}` gives it back")
        step = _newest_step(left)
    click.echo(f"cancelled; the command that submitted it resumes from {step}")
    return ExitCode.DONE


@cli.command(short_help="Give back the machines of a run.")
@click.argument("run", shell_complete=completion.runs)
@click.option("--checkpoints", metavar="URI", help="Folder of runs, if several runs have this name.")
@click.pass_context
def down(context: click.Context, run: str, checkpoints: str | None) -> int:
    """Give back the machines that RUN has rented. A running job is cancelled first."""
    context.invoke(cancel, run=run, checkpoints=checkpoints)
    record, backend, status = _find(run, checkpoints, context.obj)
    if record.kind == "cluster":
        if status:
            backend.down(record.name, lambda line: click.echo(line, err=True))
        click.echo(f"the cluster {record.name} is gone")
    return ExitCode.DONE


def _find(
    run: str, checkpoints: str | None, cloud: Cloud | None
) -> tuple[StartedRun, Cloud, JobStatus | None]:
    """Return the run's record, its backend, and its job as the backend has it."""
    from launcher.cloud.protocol import find as find_job
    from launcher.registry import find
    from trainer.bucket.address import canonical

    state = terminal.state_folder()
    address = canonical(checkpoints, Path.cwd()) if checkpoints else None
    record = find.find(state, run, address)
    backend = find.backend_of(record.kind, state, cloud)
    return record, backend, find_job(backend, record.name, record.kind)


def _newest_step(run: RunHistory) -> str:
    return f"step {max(run.commits)}" if run.commits else "the beginning: nothing was committed yet"


def _cells(row: RowDict) -> list[str]:
    shown = {**row, "usd": f"{row['usd']:.2f}" if row["usd"] is not None else None}
    return [str(shown[column]) if shown[column] is not None else "" for column in COLUMNS]
