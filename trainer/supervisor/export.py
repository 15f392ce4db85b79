"""`python -m trainer export URI`: a committed checkpoint as a model for others, here or on the Hub."""

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
from trainer.supervisor.model_card import card, merged_of
from trainer.supervisor.transfers import fetch_model
from trainer.supervisor.workers import PACKAGE_ROOT, worker_python

log = logging.getLogger(__name__)
PROGRAM = "trainer.worker.publish_model"


class ExportRequest(NamedTuple):
    """What is to become of a checkpoint."""

    step: int | None = None
    """None for the final model, or the newest checkpoint of a run that has none yet."""
    merge: bool = False
    into: Path | None = None
    push: str | None = None
    private: bool = False


def export(uri: str, wish: ExportRequest) -> Path:
    """The folder of the model, which has appeared.

    Args:
        uri: of a run, or of its `final`.
        wish: what is asked for.

    Raises:
        UserError: there is no such run or checkpoint, it does not verify, the folder is there already, or it cannot be
            put together, merged or pushed.
    """
    bucket = _run_at(uri)
    python = worker_python()
    manifest = _chosen(bucket, wish.step)
    into = (wish.into or Path(f"{bucket.run_id}-{_name(manifest)}")).absolute()
    if into.exists():
        raise UserError(f"{into} is there already", hint="name another folder with --into")
    recipe = run_record.read(bucket).recipe
    with tempfile.TemporaryDirectory(prefix="aeolus-export-") as scratch:
        task = _task(bucket, manifest, recipe, wish, into=into, work=Path(scratch))
        log.info("%s of %s: %.1f MB", _name(manifest), bucket.uri, manifest.size / 1e6)
        fetch(bucket, manifest, task.source)
        _run(python, task)
    return into


def _task(
    bucket: Bucket, manifest: Manifest, recipe: Recipe, wish: ExportRequest, *, into: Path, work: Path
) -> Publish:
    laptop = Shape(
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
        fit=fit(recipe, laptop, None),
        work=work,
        model=fetch_model(recipe.model_name_or_path, work / "input-model") if wish.merge else None,
        resume_from=None,
    )
    return Publish(
        job=job,
        source=work / "source",
        step=manifest.step,
        merge=wish.merge,
        card=card_of(bucket, recipe, manifest, name=wish.push or bucket.run_id, merged=wish.merge),
        into=into,
        push=wish.push,
        private=wish.private,
    )


def card_of(bucket: Bucket, recipe: Recipe, manifest: Manifest, *, name: str, merged: bool = False) -> str:
    """Told by all attempts' events that are in the bucket."""
    events: list[Event] = [
        event
        for each in bucket.list(EVENTS_PREFIX)
        if events_attempt(each.key)
        for event in parse(bucket.get(each.key))
    ]
    return card(recipe, events, name=name, step=manifest.step, merged=merged or merged_of(recipe, manifest))


def complete(bucket: Bucket, manifest: Manifest) -> None:
    """Put the card beside a final model that has none: not under its manifest, since all attempts write the same
    model, but each would tell of other hours. A run is done without it too.
    """
    try:
        if bucket.get_or_none(MODEL_CARD_KEY) is None:
            recipe = run_record.read(bucket).recipe
            bucket.put(MODEL_CARD_KEY, card_of(bucket, recipe, manifest, name=bucket.run_id).encode())
    except (UserError, FileNotFoundError, ValueError) as error:
        log.warning("the final model has no card: %s", error)


def _run_at(uri: str) -> Bucket:
    address = run_of_final(uri) or uri.rstrip("/")
    runs, _, run_id = address.rpartition("/")
    if not run_id:
        raise BucketError(f"{uri} names no run", hint="it ends with /<run id>, or with /<run id>/final")
    bucket = open_run(runs or ("/" if address.startswith("/") else "."), run_id)
    if bucket.get_or_none(RUN_KEY) is None:
        raise BucketError(f"there is no run at {bucket.uri}", hint=f"it has a {RUN_KEY}")
    return bucket


def _chosen(bucket: Bucket, step: int | None) -> Manifest:
    if step is not None:
        found = read(bucket, commit_key(step))
        if isinstance(found, Manifest):
            return found
        there = ", ".join(str(each.step) for each in committed(bucket)) or "none"
        raise UserError(f"run {bucket.run_id} has no checkpoint of step {step}", hint=f"it has: {there}")
    newest = final(bucket) or next(iter(committed(bucket)), None)
    if newest is None:
        raise UserError(
            f"run {bucket.run_id} has committed nothing yet", hint="wait for its first checkpoint"
        )
    return newest


def _name(manifest: Manifest) -> str:
    return "final" if manifest.kind == "final" else f"step-{manifest.step}"


def _run(python: str, task: Publish) -> None:
    """In the Python that has torch; its words go to this process' stderr."""
    file = task.job.work / "publish.json"
    file.write_text(task.model_dump_json())
    path = os.pathsep.join([str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    task.into.parent.mkdir(parents=True, exist_ok=True)
    code = subprocess.run(
        [python, "-m", PROGRAM, str(file)], env={**os.environ, "PYTHONPATH": path}, check=False
    ).returncode
    if not task.outcome.exists():
        raise RuntimeError(f"{PROGRAM} died with exit code {code}")
    outcome = Outcome.model_validate_json(task.outcome.read_text())
    if outcome.status != "done":
        raise UserError(outcome.message, hint=outcome.hint)
