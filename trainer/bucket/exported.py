"""A run's exported model as something that others start from: `s3://bucket/prefix/run/final`."""

from __future__ import annotations

from trainer.bucket.manifest import FINAL_PREFIX, Manifest, final
from trainer.bucket.store import Bucket, open_run
from trainer.errors import ModelError


def find_exported(uri: str) -> tuple[Bucket, Manifest]:
    """The run's bucket, and the manifest of its final model.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        BucketError, Unavailable: as `open_run`.
    """
    parent, _, last = uri.rstrip("/").rpartition("/")
    runs, _, run_id = parent.rpartition("/")
    if last != FINAL_PREFIX.rstrip("/") or not run_id:
        raise ModelError(
            f"model_name_or_path={uri} is not a run's model", hint="it ends with /<run id>/final"
        )
    bucket = open_run(runs, run_id)
    manifest = final(bucket)
    if manifest is None:
        raise ModelError(f"run {run_id} in {runs} has no final model yet", hint="finish that run first")
    return bucket, manifest
