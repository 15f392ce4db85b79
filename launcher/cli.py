"""The commands: parse, call one function, print. Whatever weighs something is imported where it is used."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from launcher.checkpoints_cli import checkpoints
from launcher.plan_cli import plan
from trainer.errors import ExitCode, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from launcher.follow import Answer, Ending, Submission
    from launcher.process import Home, Record
    from launcher.runs import Run

CONTEXT = {"help_option_names": ["-h", "--help"]}
TRAINING = """
Exit codes: 0 done, or left to go on by itself; 2 the recipe, the settings or the command are wrong;
75 cancelled, the same command goes on; else the trainer failed.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command. The one place where a UserError becomes text."""
    try:
        code = cli.main(arguments, prog_name="launcher", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("aborted", err=True)
        code = 1
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = ExitCode.USAGE
    sys.exit(code or 0)


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Post-training that survives losing its machine."""


cli.add_command(checkpoints)
cli.add_command(plan)


@cli.command(epilog=TRAINING)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--infra", type=click.Choice(["local"]), required=True, help="Where to train.")
@click.option(
    "--checkpoints", metavar="URI", help="Where runs live: gs://…, s3://… or a folder.  [default: settings]"
)
@click.option("--name", metavar="RUN", help="The run's name in there.  [default: recipe and its digest]")
@click.option(
    "--preempt", type=click.IntRange(min=0), default=0, metavar="N", help="Lose the machine N times."
)
@click.option("--preempt-seed", type=int, default=0, show_default=True, help="Where it is lost.")
@click.option("--detach", is_flag=True, help="Start it and come back at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; the rest on stderr.")
def submit(  # noqa: PLR0913, PLR0917 (click passes each option by name)
    recipe: str,
    overrides: tuple[str, ...],
    infra: str,  # noqa: ARG001 (one choice so far)
    checkpoints: str | None,
    name: str | None,
    preempt: int,
    preempt_seed: int,
    detach: bool,
    as_json: bool,
) -> int:
    """Train RECIPE (a file, or a name such as zephyr-tiny/dpo), or go on with its run.

    The same command is the same run: it follows the run where it is at work, and goes on from the
    newest committed checkpoint where it is not.
    """
    from launcher import local
    from launcher.follow import Wishes
    from launcher.preempt import Preemptions

    if preempt and detach:
        raise click.UsageError("--preempt needs the launcher to stay: leave --detach out")
    job = _submission(recipe, overrides, checkpoints, name)
    preemptions = Preemptions(times=preempt, seed=preempt_seed)
    ask = _ask if sys.stdin.isatty() and sys.stderr.isatty() else None
    wishes = Wishes(preemptions=preemptions, detach=detach, ask=ask)
    ending, run = local.submit(job, wishes, state=_state(), console=_stderr())
    _tell(ending, run, job, asked=preempt, as_json=as_json)
    return ending.exit_code


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list on stdout.")
def status(as_json: bool) -> None:
    """The runs that were started on this machine, the latest first."""
    from launcher import process, render

    rows = [_standing(record) for _, record in process.known(_state())]
    if as_json:
        click.echo(render.to_json(rows))
        return
    columns = ("run", "state", "pid", "step", "committed", "checkpoints")
    cells = [[str(row[column]) if row[column] is not None else "" for column in columns] for row in rows]
    _stdout().print(render.list_table(columns, cells) if rows else "no run was started on this machine yet")


@cli.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Stay until the supervisor ends.")
@click.option("--checkpoints", metavar="URI", help="Tells runs of one name apart.")
def logs(run: str, follow: bool, checkpoints: str | None) -> None:
    """Print the supervisor's log of RUN."""
    from launcher import local

    home, _ = _find(run, checkpoints)
    local.print_log(home, click.echo, follow=follow)


@cli.command()
@click.argument("run")
@click.option("--checkpoints", metavar="URI", help="Tells runs of one name apart.")
def cancel(run: str, checkpoints: str | None) -> int:
    """Stop RUN: it saves, uploads and commits first."""
    from launcher import follow, local, process

    home, record = _find(run, checkpoints)
    supervisor = process.attach(home)
    if supervisor is None:
        click.echo(f"{record.run_id} is not at work on this machine")
        return ExitCode.DONE
    click.echo(f"cancelling {record.run_id} (pid {supervisor.pid}): it saves, uploads and commits first")
    follow.cancel(home, supervisor)
    local.print_log(home, click.echo, follow=True, last_lines=0)
    click.echo("cancelled; the command that started it goes on from the newest commit")
    return ExitCode.DONE


def _submission(
    recipe: str, overrides: Sequence[str], checkpoints: str | None, name: str | None
) -> Submission:
    from launcher import local, settings
    from launcher.follow import Submission
    from launcher.runs import canonical
    from trainer.recipe import default_run_id, load

    site = settings.load(os.environ)
    loaded = load(recipe, overrides)
    address = canonical(checkpoints or site.checkpoints, Path.cwd())
    run_id = local.checked_run_id(name) if name else default_run_id(loaded.recipe)
    return Submission(
        run_id=run_id,
        recipe=recipe,
        checkpoints=address,
        command=local.supervisor_command(recipe, overrides, checkpoints=address, run_id=run_id),
        environment=local.supervisor_environment(os.environ, trainer_python=site.trainer_python),
    )


def _tell(ending: Ending, run: Run, job: Submission, *, asked: int, as_json: bool) -> None:
    """The report: table or JSON, and the picture as soon as there is something to see."""
    from launcher import render, report

    facts = report.summary(run)
    picture = None
    if run.steps and ending.how != "detached":
        picture = report.picture_path(job.checkpoints, job.run_id)
        report.draw(run, picture)
    if as_json:
        about = {"ending": ending.how, "message": ending.message, "preempted_on_request": ending.preempted}
        click.echo(render.to_json({**facts.as_dict(), **about, "report": str(picture) if picture else None}))
    elif picture:
        _stdout().print(render.facts_table([*facts.rows(), ("picture", str(picture))], title=job.run_id))
    if ending.how == "done" and ending.preempted < asked:
        missed = asked - ending.preempted
        click.echo(f"{missed} of {asked} preemptions could not be done: training was over before", err=True)
    click.echo(ending.message, err=True)


def _ask() -> Answer:
    answers: dict[str, Answer] = {"d": "detach", "c": "cancel"}
    try:
        typed = input(
            "\n[d]etach: training goes on by itself; [c]ancel: save and stop; anything else: continue > "
        )
    except EOFError:
        return "continue"
    return answers.get(typed.strip().lower()[:1], "continue")


def _find(run: str, checkpoints: str | None) -> tuple[Home, Record]:
    from launcher import process
    from launcher.runs import canonical

    address = canonical(checkpoints, Path.cwd()) if checkpoints else None
    known = process.known(_state())
    found = [entry for entry in known if entry[1].run_id == run and address in (None, entry[1].checkpoints)]
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(record.checkpoints for _, record in found)
        raise UserError(
            f"{len(found)} runs are called {run}: in {places}", hint="choose one with --checkpoints"
        )
    names = ", ".join(dict.fromkeys(record.run_id for _, record in known)) or "none yet"
    raise UserError(f"no run {run} was started on this machine", hint=f"known runs: {names}")


def _standing(record: Record) -> dict[str, str | int | None]:
    """How a run stands by its process and by its bucket; the bucket may be out of reach."""
    from launcher.runs import Reader
    from trainer.bucket import open_run

    row: dict[str, str | int | None] = {
        "run": record.run_id,
        "recipe": record.recipe,
        "checkpoints": record.checkpoints,
    }
    alive = record.process() is not None
    row["pid"] = record.pid if alive else None
    try:
        run = Reader(open_run(record.checkpoints, record.run_id), record.run_id).read()
    except UserError as error:
        return {
            **row,
            "state": "running" if alive else "?",
            "step": None,
            "committed": None,
            "error": error.message,
        }
    stopped = "preempted" if run.state == "running" else run.state
    row["state"] = "running" if alive and run.state != "done" else stopped
    return {**row, "step": run.step, "committed": max(run.commits, default=None), "error": None}


def _state() -> Path:
    from platformdirs import user_state_path

    return user_state_path("aeolus")


def _stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)
