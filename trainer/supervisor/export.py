"""`python -m trainer export URI`: turns a committed checkpoint into a model, here or on the Hub.

It also writes the model card beside the final model of a run.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from trainer import run_record
from trainer.bucket import Bucket, open_run
from trainer.bucket.layout import (
    EVENTS_PREFIX,
    MODEL_CARD_KEY,
    RUN_KEY,
    commit_key,
    events_attempt,
    run_of_final,
)
from trainer.bucket.manifest import Manifest, committed, final, read
from trainer.bucket.restore import fetch
from trainer.errors import BucketError, UserError
from trainer.events import Event, parse
from trainer.fit import fit
from trainer.hardware import Shape
from trainer.job import Job, Outcome, Publish
from trainer.recipe import Recipe
from trainer.supervisor.model_card import card, is_merged
from trainer.supervisor.transfers import fetch_model
from trainer.supervisor.workers import PACKAGE_ROOT, worker_python

log = logging.getLogger(__name__)
PROGRAM = "trainer.worker.publish_model"


class ExportRequest(NamedTuple):
    """Which checkpoint to export, and how."""

    step: int | None = None
    """None: the final model, or the newest checkpoint if the run has no final model yet."""
    merge: bool = False
    """Merge the adapter into its base model."""
    into: Path | None = None
    """The folder to create. None: a folder named after the run and the checkpoint."""
    push: str | None = None
    """The repository of the Hub to upload the model to."""
    private: bool = False
    """Make the repository private if it has to be created."""


def export(uri: str, request: ExportRequest) -> Path:
    """Export a checkpoint and return the folder of the model.

    Args:
        uri: address of a run, or of its `final`.
        request: which checkpoint to export, and how.

    Raises:
        UserError: the run or checkpoint does not exist or does not verify, the folder exists already, or the model
            cannot be assembled, merged or uploaded.
    """
    bucket = _open_run_at(uri)
    python = worker_python()
    manifest = _choose(bucket, request.step)
    manifest.refuse_unknown()
    into = (request.into or Path(f"{bucket.run_id}-{_name(manifest)}")).absolute()
    if into.exists():
        raise UserError(f"the folder {into} exists already", hint="choose another folder with --into")
    recipe = run_record.read(bucket).recipe
    with tempfile.TemporaryDirectory(prefix="aeolus-export-") as scratch:
        task = _publish_job(bucket, manifest, recipe, request, into=into, work=Path(scratch))
        log.info("%s of %s: %.1f MB", _name(manifest), bucket.uri, manifest.size / 1e6)
        fetch(bucket, manifest, task.source)
        _run_publisher(python, task)
    return into


def _publish_job(
    bucket: Bucket, manifest: Manifest, recipe: Recipe, request: ExportRequest, *, into: Path, work: Path
) -> Publish:
    # The export runs on the CPU. The host memory is set so high that the fit never refuses the recipe.
    cpu = Shape(
        accelerator=None,
        count=0,
        memory_gib=None,
        cores=os.cpu_count() or 1,
        host_memory_gib=2.0**20,
        node="here",
    )
    job = Job(
        run_id=bucket.run_id,
        attempt=manifest.attempt,
        recipe=recipe,
        fit=fit(recipe, cpu, None),
        work=work,
        model=fetch_model(recipe.model_name_or_path, work / "input-model") if request.merge else None,
        resume_from=None,
    )
    return Publish(
        job=job,
        source=work / "source",
        step=manifest.step,
        merge=request.merge,
        card=card_of(bucket, recipe, manifest, name=request.push or bucket.run_id, merged=request.merge),
        into=into,
        push=request.push,
        private=request.private,
    )


def card_of(bucket: Bucket, recipe: Recipe, manifest: Manifest, *, name: str, merged: bool = False) -> str:
    """Return the model card of a commit, from the events of all attempts in the bucket."""
    events: list[Event] = [
        event
        for item in bucket.list(EVENTS_PREFIX)
        if events_attempt(item.key)
        for event in parse(bucket.get(item.key))
    ]
    return card(recipe, events, name=name, step=manifest.step, merged=merged or is_merged(recipe, manifest))


def complete(bucket: Bucket, manifest: Manifest) -> None:
    """Write the model card beside the final model, if it has none.

    The manifest does not list the card. All attempts write the same final model, but their cards would differ in the
    hours. If the card cannot be written, a warning is logged and the run is still done.
    """
    try:
        if bucket.get_or_none(MODEL_CARD_KEY) is None:
            recipe = run_record.read(bucket).recipe
            bucket.put(MODEL_CARD_KEY, card_of(bucket, recipe, manifest, name=bucket.run_id).encode())
    except (UserError, FileNotFoundError, ValueError) as error:
        log.warning("cannot write the model card of the final model: %s", error)


def _open_run_at(uri: str) -> Bucket:
    address = run_of_final(uri) or uri.rstrip("/")
    runs, _, run_id = address.rpartition("/")
    if not run_id:
        raise BucketError(
            f"{uri} is not the address of a run", hint="it must end with /<run id> or /<run id>/final"
        )
    bucket = open_run(runs or ("/" if address.startswith("/") else "."), run_id)
    if bucket.get_or_none(RUN_KEY) is None:
        raise BucketError(
            f"there is no run at {bucket.uri}", hint=f"check the address; a run's folder has a {RUN_KEY}"
        )
    return bucket


def _choose(bucket: Bucket, step: int | None) -> Manifest:
    if step is not None:
        found = read(bucket, commit_key(step))
        if isinstance(found, Manifest):
            return found
        steps = ", ".join(str(manifest.step) for manifest in committed(bucket)) or "none"
        raise UserError(
            f"run {bucket.run_id} has no checkpoint of step {step}", hint=f"committed steps: {steps}"
        )
    newest = final(bucket) or next(iter(committed(bucket)), None)
    if newest is None:
        raise UserError(
            f"run {bucket.run_id} has committed nothing yet", hint="wait for its first checkpoint"
        )
    return newest


def _name(manifest: Manifest) -> str:
    return "final" if manifest.kind == "final" else f"step-{manifest.step}"


def _run_publisher(python: str, task: Publish) -> None:
    """Run the publishing program in the Python that has torch. Its log goes to this process' stderr."""
    file = task.job.work / "publish.json"
    file.write_text(task.model_dump_json())
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    task.into.parent.mkdir(parents=True, exist_ok=True)
    code = subprocess.run(
        [python, "-m", PROGRAM, str(file)], env={**os.environ, "PYTHONPATH": path}, check=False
    ).returncode
    if not task.outcome.exists():
        raise RuntimeError(f"{PROGRAM} crashed (exit code {code}); its traceback is above")
    outcome = Outcome.model_validate_json(task.outcome.read_text())
    if outcome.status != "done":
        raise UserError(outcome.message, hint=outcome.hint)
