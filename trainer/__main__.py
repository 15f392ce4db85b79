"""`python -m trainer run RECIPE`: one attempt at a run on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click

from trainer.errors import ExitCode, UserError
from trainer.options import BUDGET_USD, DEADLINE_H, DurationParam
from trainer.supervisor.preemption import Notice

TASK_ID_VARIABLE = "SKYPILOT_TASK_ID"
"""SkyPilot 0.14.1 keeps its value across the recoveries of a managed job, so it names the run."""


class Options(NamedTuple):
    """The options of the `run` command."""

    checkpoints: str
    run_id: str | None
    work: Path | None
    staging: Literal["auto", "tmpfs", "disk"]
    budget: float | None
    deadline: float | None


@click.group()
def main() -> None:
    """Train a recipe with checkpoints in a bucket, so that another machine can resume the run."""


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoints", required=True, help="Folder of all runs: gs://…, s3://… or a local folder.")
@click.option(
    "--run-id", help="Name of the run in that folder.  [default: the managed job's, or recipe and digest]"
)
@click.option("--work", type=click.Path(path_type=Path), help="Scratch folder on this machine.")
@click.option(
    "--staging",
    type=click.Choice(["auto", "tmpfs", "disk"]),
    default="auto",
    show_default=True,
    help="Where checkpoints wait for upload: memory if three of them fit, or the disk of --work.",
)
@click.option(
    "--budget",
    envvar=BUDGET_USD,
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="The most that all attempts may cost. The run saves and stops when it is used up.",
)
@click.option(
    "--deadline",
    envvar=DEADLINE_H,
    type=DurationParam(),
    metavar="TIME",
    help="Time since the start of the first attempt (90m, 24h, 2d) after which the run saves and stops.",
)
def run(recipe: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Start or resume the run of RECIPE, a file or a name such as zephyr-tiny/dpo.

    Exit codes: 0 done; 75 preempted or the infrastructure failed, start it again; 77 a newer attempt
    owns the run; 78 the recipe, data or bucket is wrong; 79 the budget or the deadline is used up and the progress
    is saved; any other code is a bug.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout
    )
    notice = Notice()
    notice.handle_signals()
    try:
        code = _run(recipe, overrides, Options(**options), notice)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    sys.exit(code)


@main.command()
@click.argument("uri")
@click.option(
    "--step",
    type=int,
    help="Step of the checkpoint to export.  [default: the final model, or the newest checkpoint]",
)
@click.option("--merge", is_flag=True, help="Merge an adapter into its base model.")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    help="Folder to create.  [default: the run's name, in the current folder]",
)
@click.option("--push", metavar="ORG/NAME", help="Upload the model to the Hub, with the token in $HF_TOKEN.")
@click.option("--private", is_flag=True, help="Make the Hub's repository private, if it is created.")
def export(uri: str, **options: Any) -> None:
    """Export the model of the run at URI: safetensors, tokenizer, configs and model card. Needs no GPU."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from trainer.supervisor.export import ExportRequest, export

    try:
        click.echo(export(uri, ExportRequest(**options)))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _run(recipe: str, overrides: tuple[str, ...], options: Options, notice: Notice) -> ExitCode:
    # Imported late, so that `--help` and early signals are handled at once.
    from trainer.accounting import Limits
    from trainer.recipe import default_run_id, load
    from trainer.supervisor.attempt import RunRequest
    from trainer.supervisor.preemption import MetadataWatcher
    from trainer.supervisor.run import run
    from trainer.supervisor.team import read_position

    position = read_position(os.environ)
    MetadataWatcher(notice).start()
    loaded = load(recipe, overrides)
    for note in loaded.notes:
        logging.getLogger("trainer").info("%s", note)
    run_id = options.run_id or _task_id() or default_run_id(loaded.recipe)
    work = (options.work or _scratch()) / work_folder(run_id, options.checkpoints)
    request = RunRequest(
        recipe=loaded.recipe,
        notes=loaded.notes,
        checkpoints=options.checkpoints,
        run_id=run_id,
        work=work,
        staging=options.staging,
        limits=Limits(budget_usd=options.budget, deadline_h=options.deadline),
    )
    return run(request, notice, position)


def work_folder(run_id: str, checkpoints: str) -> str:
    """Return the name of a run's work folder. All spellings of the checkpoints address give the same name.

    Raises:
        BucketError: `checkpoints` is not a valid address.
    """
    from trainer.bucket.address import parse

    return f"{run_id}-{hashlib.sha256(str(parse(checkpoints)).encode()).hexdigest()[:8]}"


def _task_id() -> str | None:
    task_id = os.environ.get(TASK_ID_VARIABLE)
    return re.sub(r"[^A-Za-z0-9._-]+", "-", task_id) if task_id else None


def _scratch() -> Path:
    return Path(tempfile.gettempdir()) / f"aeolus-{os.getuid()}"


if __name__ == "__main__":
    main()
