"""`python -m launcher submit`: the request that the options make, here or on machines that SkyPilot finds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher import completion, terminal
from trainer.errors import ExitCode
from trainer.options import DurationParam

if TYPE_CHECKING:
    from launcher.cloud.protocol import Cloud
    from launcher.local.follow import Ending, Submission
    from launcher.runs.run import RunHistory
    from launcher.submit.prepare import Order, SubmitOptions

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
Exit codes: 0 done, or left to go on by itself; 2 the recipe, the settings or the command are wrong, nothing that
can be rented will do, or none of it can be had; 75 cancelled, the same command goes on; 79 the budget
or the deadline is used up, what there is is saved, --resume with a higher one goes on; else the trainer failed.
"""


@click.command(epilog=TRAINING, short_help="Train: here, or on rented machines.")
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
@click.option("--nodes", type=click.IntRange(min=1), help="Machines.  [default: the task's, else 1]")
@click.option(
    "--spot/--on-demand",
    default=None,
    help="Only one of the markets; spot implies --managed.  [default: both]",
)
@click.option("--managed", is_flag=True, help="As a managed job: SkyPilot replaces a machine that is lost.")
@click.option(
    "--infra",
    multiple=True,
    metavar="CLOUD[/REGION]",
    shell_complete=completion.infra,
    help="Where; may be repeated. `slurm`, `kubernetes`, `ssh`: machines of your own; `local`: this one."
    "  [default: settings, else gcp and lambda]",
)
@click.option(
    "--image",
    help="Docker image that has the trainer; `auto` makes that of this checkout.  [default: settings, else none]",
)
@click.option(
    "--checkpoints",
    metavar="URI",
    help="Where runs live: gs://…, s3://…, or a folder here.  [default: settings]",
)
@click.option("--name", metavar="RUN", help="The run's name in there.  [default: recipe and its digest]")
@click.option("--retry-until-up", is_flag=True, help="Ask for a machine until there is one.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="At most, of all attempts together: the plan keeps to it, and so does the run, which saves and stops.",
)
@click.option(
    "--deadline",
    type=DurationParam(),
    metavar="TIME",
    help="Likewise, since the first attempt began: 90m, 24h, 2d.",
)
@click.option(
    "--resume",
    metavar="RUN",
    shell_complete=completion.runs,
    help="Go on with a run by its name: its recipe, bucket, place and limits.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Of a data set that is not known here.")
@click.option("--dryrun", is_flag=True, help="Print the task, and why it is this; rent nothing.")
@click.option(
    "--preempt", type=click.IntRange(min=0), default=0, metavar="N", help="Local: lose the machine N times."
)
@click.option("--preempt-seed", type=int, default=0, show_default=True, help="Where it is lost.")
@click.option("--detach", is_flag=True, help="Start it and come back at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; the rest on stderr.")
@click.pass_obj
def submit(cloud: Cloud | None, /, recipe: str | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Train RECIPE (a file, or a name such as zephyr-7b/dpo_full) or a TASK of jobs/, or go on with its run.

    Without either: dpo_full. The same command is the same run: it follows the run where it is at work, and goes on
    from the newest committed checkpoint where it is not.
    """
    if recipe and "=" in recipe and not Path(recipe).exists():  # `submit learning_rate=1e-6`
        overrides, recipe = (recipe, *overrides), None
    if options["resume"]:
        recipe, options = _resumed(recipe, options)
    _check(options)
    if LOCAL in options["infra"]:
        return _here(recipe, overrides, options)
    return _there(recipe, overrides, options, cloud)


def _resumed(recipe: str | None, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    from launcher.submit.resume import resume

    if recipe or options["name"]:
        raise click.UsageError("--resume RUN has its recipe and its name")
    return resume(options["resume"], options, state=terminal.state_folder(), environ=os.environ)


def _check(options: dict[str, Any]) -> None:
    terminal.refuse_empty(options)
    here = LOCAL in options["infra"]
    if here and len(options["infra"]) > 1:
        raise click.UsageError("--infra local is this machine alone")
    wrong = [name for name in (CLOUD_ONLY if here else LOCAL_ONLY) if options[name] not in (None, False, 0)]
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        raise click.UsageError(
            f"{flag} means nothing with --infra local" if here else f"{flag} is for --infra local"
        )
    if options["preempt"] and options["detach"]:
        raise click.UsageError("--preempt needs the launcher to stay: leave --detach out")


def _here(recipe: str | None, overrides: Sequence[str], options: dict[str, Any]) -> int:
    from launcher.local import submit as machine
    from launcher.local.fault_injection import Preemptions
    from launcher.local.follow import FollowOptions
    from launcher.submit import job_files

    name = job_files.recipe_of(recipe or job_files.DEFAULT)
    job = _submission(name, overrides, options)
    preemptions = Preemptions(times=options["preempt"], seed=options["preempt_seed"])
    wishes = FollowOptions(preemptions=preemptions, detach=options["detach"], ask=_ask())
    ending, run = machine.submit(job, wishes, state=terminal.state_folder(), console=terminal.stderr())
    _tell(ending, run, job.checkpoints, asked=options["preempt"], as_json=options["as_json"])
    return ending.exit_code


def _there(
    recipe: str | None, overrides: tuple[str, ...], options: dict[str, Any], cloud: Cloud | None
) -> int:
    from datetime import UTC, datetime

    from launcher.cloud.skypilot import SkyPilot
    from launcher.submit import prepare as orders
    from launcher.submit.launch import SubmitContext
    from launcher.submit.launch import submit as launch

    order = orders.prepare(_wanted(recipe, overrides, options), environ=os.environ, now=datetime.now(UTC))
    for line in order.said:
        click.echo(line, err=True)
    if options["dryrun"]:
        _print_order(order, as_json=options["as_json"])
        return ExitCode.DONE
    console = terminal.stderr()
    desk = SubmitContext(
        cloud=cloud or SkyPilot(),
        state=terminal.state_folder(),
        say=lambda line: console.print(line, markup=False, emoji=False, soft_wrap=True),
        ask=_ask(),
    )
    ending, run = launch(order, desk, detach=options["detach"])
    price = order.row.usd_per_h if order.row else None
    _tell(ending, run, order.request.checkpoints, asked=0, as_json=options["as_json"], usd_per_h=price)
    return ending.exit_code


def _wanted(recipe: str | None, overrides: tuple[str, ...], options: dict[str, Any]) -> SubmitOptions:
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


def _print_order(order: Order, *, as_json: bool) -> None:
    """The task alone on stdout, as a file that `sky launch` takes; why it is this went to stderr."""
    from launcher import render
    from launcher.submit import task

    verb = "sky jobs launch" if order.managed else "sky launch"
    if as_json:
        row = order.row.model_dump(mode="json") if order.row else None
        click.echo(render.to_json({"task": order.config, "verb": verb, "row": row, "why": order.said}))
        return
    click.echo(task.to_yaml(order.config), nl=False)
    secrets = "".join(f" --secret {name}" for name in order.request.secrets)
    click.echo(f"by hand: {verb} TASK.yaml{secrets}", err=True)


def _submission(recipe: str, overrides: Sequence[str], options: dict[str, Any]) -> Submission:
    from launcher import settings
    from launcher.local import submit as machine
    from launcher.local.follow import Submission
    from launcher.runs.limits import limits_for
    from launcher.submit import cost_variables
    from trainer.bucket.address import canonical
    from trainer.bucket.layout import checked_run_id
    from trainer.recipe import default_run_id, load

    site = settings.load(os.environ)
    loaded = load(recipe, overrides)
    address = canonical(options["checkpoints"] or site.checkpoints, Path.cwd())
    run_id = checked_run_id(options["name"], new=True) if options["name"] else default_run_id(loaded.recipe)
    limits = limits_for(
        site, budget_usd=options["budget"], deadline_h=options["deadline"], owned="this machine"
    )
    told = cost_variables.own_price(site.usd_per_h) | cost_variables.limits(limits)
    return Submission(
        run_id=run_id,
        recipe=recipe,
        checkpoints=address,
        command=machine.supervisor_command(recipe, overrides, checkpoints=address, run_id=run_id),
        environment=machine.supervisor_environment(os.environ, trainer_python=site.trainer_python, told=told),
        limits=limits,
    )


def _tell(
    ending: Ending,
    run: RunHistory,
    checkpoints: str,
    *,
    asked: int,
    as_json: bool,
    usd_per_h: float | None = None,
) -> None:
    """The report: table or JSON, and the picture as soon as there is something to see."""
    from launcher import render
    from launcher.registry.local import Home
    from launcher.runs import summary

    facts = summary.summary(run, usd_per_h=usd_per_h)
    picture = None
    if run.steps and ending.how != "detached":
        home = Home.of(terminal.state_folder(), run.run_id, checkpoints).path
        picture = summary.picture_path(checkpoints, run.run_id, home=home)
        summary.draw(run, picture)
    if as_json:
        about = {"ending": ending.how, "message": ending.message, "preempted_on_request": ending.preempted}
        click.echo(render.to_json({**facts.as_dict(), **about, "report": str(picture) if picture else None}))
    elif picture:
        rows = [*facts.rows(), ("picture", str(picture))]
        terminal.stdout().print(render.facts_table(rows, title=run.run_id))
    if ending.how == "done" and ending.preempted < asked:
        missed = asked - ending.preempted
        click.echo(f"{missed} of {asked} preemptions could not be done: training was over before", err=True)
    click.echo(ending.message, err=True)


def _ask() -> Any:
    return terminal.ask if sys.stdin.isatty() and sys.stderr.isatty() else None
