"""The command `launcher submit`: train on this machine, or on machines that SkyPilot finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import completion, terminal
from trainer.errors import ExitCode
from trainer.options import DurationParam

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud
    from launcher.runs.run import RunHistory
    from launcher.submit.follow import SubmitContext
    from launcher.submit.outcome import Ending
    from launcher.submit.prepare import Submission, SubmitOptions

LOCAL = "local"
LOCAL_ONLY = ("preempt",)
CLOUD_ONLY = (
    "gpus",
    "nodes",
    "spot",
    "managed",
    "image",
    "retry_until_up",
    "rows",
    "dryrun",
)
TRAINING = """
Exit codes: 0 done, or left running; 2 the recipe, the settings or the command is wrong, no machine fits, or none
is available; 75 cancelled, the same command resumes; 79 the budget or the deadline is used up, the work is saved,
--resume with a higher one continues; any other: the trainer failed.
"""


@click.command(epilog=TRAINING, short_help="Train here or on rented machines.")
@click.argument(
    "recipe", required=False, metavar="[RECIPE|TASK]", shell_complete=completion.recipes_and_tasks
)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--gpus",
    metavar="NAME[:N]",
    shell_complete=completion.gpus,
    help="GPUs of a node, such as A100:8.  [default: the plan's]",
)
@click.option(
    "--nodes", type=click.IntRange(min=1), help="Number of machines.  [default: the task's, else 1]"
)
@click.option(
    "--spot/--on-demand",
    default=None,
    help="Use one market only; spot implies --managed.  [default: both]",
)
@click.option("--managed", is_flag=True, help="Submit a managed job: SkyPilot replaces a lost machine.")
@click.option(
    "--infra",
    multiple=True,
    metavar="CLOUD[/REGION]",
    shell_complete=completion.infra,
    help="Where to run; may be repeated. `slurm`, `kubernetes`, `ssh`: your own machines; `local`: this one."
    "  [default: settings, else gcp and lambda]",
)
@click.option(
    "--image",
    help="Docker image with the trainer; `auto` builds that of this checkout.  [default: settings, else none]",
)
@click.option(
    "--checkpoints",
    metavar="URI",
    help="Folder of runs: gs://…, s3://…, or a local folder.  [default: settings]",
)
@click.option("--name", metavar="RUN", help="Name of the run.  [default: the recipe's name and digest]")
@click.option("--retry-until-up", is_flag=True, help="Ask again until a machine is available.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="Cost limit of all attempts together: the plan keeps to it, and the run saves and stops at it.",
)
@click.option(
    "--deadline",
    type=DurationParam(),
    metavar="TIME",
    help="Time limit since the first attempt began: 90m, 24h, 2d.",
)
@click.option(
    "--resume",
    metavar="RUN",
    shell_complete=completion.runs,
    help="Continue a run by its name, with its recipe, bucket, place and limits.",
)
@click.option(
    "--rows", type=click.IntRange(min=1), help="Number of rows of a data set that is not known here."
)
@click.option("--dryrun", is_flag=True, help="Print the task and the reasons for it; rent nothing.")
@click.option(
    "--preempt",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Local only: kill the run N times, like a lost machine.",
)
@click.option(
    "--preempt-seed", type=int, default=0, show_default=True, help="Seed for the steps at which it is killed."
)
@click.option("--detach", is_flag=True, help="Start the run and return at once.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; all else on stderr.")
@click.pass_obj
def submit(cloud: Cloud | None, /, recipe: str | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Train RECIPE (a file, or a name such as zephyr-7b/dpo_full) or a TASK of jobs/.

    The default is dpo_full. The same command is the same run: it follows a run that is running, and otherwise resumes
    from the newest committed checkpoint.
    """
    if recipe and "=" in recipe and not Path(recipe).exists():  # `submit learning_rate=1e-6`
        overrides, recipe = (recipe, *overrides), None
    if options["resume"]:
        recipe, options = _resumed(recipe, options)
    _check(options)
    return _submit(recipe, overrides, options, cloud)


def _resumed(recipe: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from launcher.submit.resume import resume

    if recipe or options["name"]:
        raise click.UsageError(
            "--resume RUN takes the recipe and the name from the run: leave out RECIPE and --name"
        )
    return resume(options["resume"], options, state=terminal.state_folder(), environ=os.environ)


def _check(options: dict[str, Any]) -> None:
    terminal.refuse_empty(options)
    local = LOCAL in options["infra"]
    if local and len(options["infra"]) > 1:
        raise click.UsageError(
            "--infra local cannot be combined with another --infra: it is this machine alone"
        )
    wrong = [name for name in (CLOUD_ONLY if local else LOCAL_ONLY) if options[name] not in (None, False, 0)]
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise click.UsageError(
            f"{flag} cannot be used with --infra local" if local else f"{flag} is for --infra local only"
        )
    if options["preempt"] and options["detach"]:
        raise click.UsageError("--preempt needs a launcher that follows the run: leave out --detach")


def _submit(
    recipe: str | None, overrides: tuple[str, ...], options: dict[str, Any], cloud: Cloud | None
) -> int:
    from datetime import UTC, datetime

    from launcher.submit import launch
    from launcher.submit.prepare import prepare

    parsed = _parsed(recipe, overrides, options)
    job = prepare(parsed, environ=os.environ, now=datetime.now(UTC))
    for line in job.reasons:
        click.echo(line, err=True)
    if options["dryrun"]:
        _print_task(job, as_json=options["as_json"])
        return ExitCode.DONE
    ending, run = launch.submit(job, _context(job, options, cloud), detach=options["detach"])
    _print_ending(ending, run, job, options)
    return ending.exit_code


def _parsed(recipe: str | None, overrides: tuple[str, ...], options: dict[str, Any]) -> SubmitOptions:
    from launcher.submit.prepare import SubmitOptions

    same = (
        "gpus",
        "nodes",
        "spot",
        "managed",
        "infra",
        "name",
        "image",
        "checkpoints",
        "retry_until_up",
        "rows",
    )
    return SubmitOptions(
        source=recipe,
        overrides=overrides,
        budget_usd=options["budget"],
        deadline_h=options["deadline"],
        **{name: options[name] for name in same},
    )


def _context(job: Submission, options: dict[str, Any], cloud: Cloud | None) -> SubmitContext:
    """Return the backend of the job, the view of its progress, and how the user is asked."""
    from launcher.cloud.local import LocalMachine
    from launcher.local.fault_injection import Preemptions
    from launcher.local.progress import LineView, view_on
    from launcher.registry.find import backend_of
    from launcher.submit.follow import SubmitContext

    state, console = terminal.state_folder(), terminal.stderr()
    backend = backend_of(job.launch.kind, state, cloud)
    local = isinstance(backend, LocalMachine)
    return SubmitContext(
        backend=backend,
        state=state,
        view=view_on(console)
        if local
        else LineView(lambda line: console.print(line, markup=False, emoji=False, soft_wrap=True)),
        ask=terminal.ask if sys.stdin.isatty() and sys.stderr.isatty() else None,
        preemptions=Preemptions(times=options["preempt"], seed=options["preempt_seed"]),
        kill=backend.kill if isinstance(backend, LocalMachine) else None,
    )


def _print_task(job: Submission, *, as_json: bool) -> None:
    """Print the task alone on stdout, as a file that `sky launch` takes. The reasons have gone to stderr."""
    from launcher import render
    from launcher.submit import task

    verb = "sky jobs launch" if job.launch.kind == "managed job" else "sky launch"
    if as_json:
        row = job.row.model_dump(mode="json") if job.row else None
        click.echo(render.to_json({"task": job.launch.task, "verb": verb, "row": row, "why": job.reasons}))
        return
    click.echo(task.to_yaml(job.launch.task), nl=False)
    secrets = "".join(f" --secret {name}" for name in job.launch.secrets)
    click.echo(f"by hand: {verb} TASK.yaml{secrets}", err=True)


def _print_ending(ending: Ending, run: RunHistory, job: Submission, options: dict[str, Any]) -> None:
    """Print the summary as a table or JSON, and draw the curves once the run has a step."""
    from launcher import render
    from launcher.local.process import Home
    from launcher.runs import summary

    facts = summary.summary(run, usd_per_h=job.row.usd_per_h if job.row else None)
    picture = None
    checkpoints = job.launch.checkpoints
    if run.steps and ending.how != "detached":
        home = Home.of(terminal.state_folder(), run.run_id, checkpoints).path
        picture = summary.picture_path(checkpoints, run.run_id, home=home)
        summary.draw(run, picture)
    if options["as_json"]:
        about = {"ending": ending.how, "message": ending.message, "preempted_on_request": ending.preempted}
        click.echo(render.to_json({**facts.as_dict(), **about, "report": str(picture) if picture else None}))
    elif picture:
        rows = [*facts.rows(), ("picture", str(picture))]
        terminal.stdout().print(render.facts_table(rows, title=run.run_id))
    requested = options["preempt"]
    if ending.how == "done" and ending.preempted < requested:
        missed = requested - ending.preempted
        click.echo(f"{missed} of {requested} preemptions did not happen: training ended first", err=True)
    click.echo(ending.message, err=True)
