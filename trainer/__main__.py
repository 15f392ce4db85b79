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
"""The same across the recoveries of a managed job, so it names the run (SkyPilot 0.14.1)."""


class Options(NamedTuple):
    """The options of `run`, as click hands them over."""

    checkpoints: str
    run_id: str | None
    work: Path | None
    staging: Literal["auto", "tmpfs", "disk"]
    budget: float | None
    deadline: float | None


@click.group()
def main() -> None:
    """Trains a recipe, checkpointed to a bucket, so that another machine can go on."""


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--checkpoints", required=True, help="Where runs live: gs://…, s3://… or a folder.")
@click.option("--run-id", help="The run's name in there.  [default: the managed job's, or recipe and digest]")
@click.option("--work", type=click.Path(path_type=Path), help="Scratch folder on this machine.")
@click.option(
    "--staging",
    type=click.Choice(["auto", "tmpfs", "disk"]),
    default="auto",
    show_default=True,
    help="Where checkpoints wait for their upload: memory if there is room for three, or --work's disk.",
)
@click.option(
    "--budget",
    envvar=BUDGET_USD,
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="Of all attempts together: when it is used up, the run saves and stops.",
)
@click.option(
    "--deadline",
    envvar=DEADLINE_H,
    type=DurationParam(),
    metavar="TIME",
    help="90m, 24h, 2d since the first attempt began: likewise.",
)
def run(recipe: str, overrides: tuple[str, ...], **options: Any) -> None:
    """Start RECIPE (a file, or a name such as zephyr-tiny/dpo), or go on with its run.

    Exit codes: 0 done; 75 preempted or the infrastructure failed, start it again; 77 a newer attempt
    owns the run; 78 the recipe, data or bucket is wrong; 79 the budget or the deadline is used up, what there
    is is saved; else a bug.
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
    "--step", type=int, help="Of a checkpoint.  [default: the final model, or the newest checkpoint]"
)
@click.option("--merge", is_flag=True, help="An adapter into the base that it was trained on, as one model.")
@click.option(
    "--into", type=click.Path(path_type=Path), help="Folder to make.  [default: the run's name, here]"
)
@click.option("--push", metavar="ORG/NAME", help="Upload it to the Hub, with the token of $HF_TOKEN.")
@click.option("--private", is_flag=True, help="The Hub's repository, if it has to be made.")
def export(uri: str, **wishes: Any) -> None:
    """Make a model for others of the run at URI: safetensors, tokenizer, configs, model card; no GPU is needed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from trainer.supervisor.export import ExportRequest, export

    try:
        click.echo(export(uri, ExportRequest(**wishes)))
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def _run(recipe: str, overrides: tuple[str, ...], options: Options, notice: Notice) -> ExitCode:
    # Imported here so that `--help` and a signal in the first moments are answered at once.
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
    """Its name: that of a run in one place, however its address is written and wherever a relative one begins.

    Raises:
        BucketError: it is no address.
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
