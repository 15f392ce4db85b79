"""A model that lies in a bucket, brought here: `s3://bucket/prefix/run/final`."""

from __future__ import annotations

from pathlib import Path

from trainer.bucket import open_run
from trainer.bucket.manifest import FINAL_PREFIX, final
from trainer.bucket.restore import fetch
from trainer.errors import ModelError


def fetch_model(source: str | None, into: Path) -> str | None:
    """What the worker is to load: `source` itself, or the folder that a bucket's model was fetched to.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        CorruptCheckpoint: a file does not have the size or checksum of the manifest.
    """
    if source is None or "://" not in source:
        return source
    parent, _, last = source.rstrip("/").rpartition("/")
    runs, _, run_id = parent.rpartition("/")
    if last != FINAL_PREFIX.rstrip("/") or not run_id:
        raise ModelError(
            f"model_name_or_path={source} is not a run's model", hint="it ends with /<run id>/final"
        )
    bucket = open_run(runs, run_id)
    manifest = final(bucket)
    if manifest is None:
        raise ModelError(f"run {run_id} in {runs} has no final model yet", hint="finish that run first")
    fetch(bucket, manifest, into)
    return str(into)
