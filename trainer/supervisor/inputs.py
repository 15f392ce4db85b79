"""A model that lies in a bucket, brought here: `s3://bucket/prefix/run/final`."""

from __future__ import annotations

from pathlib import Path

from trainer.bucket.exported import find_exported
from trainer.bucket.restore import fetch


def fetch_model(source: str | None, into: Path) -> str | None:
    """What the worker is to load: `source` itself, or the folder that a bucket's model was fetched to.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        CorruptCheckpoint: a file does not have the size or checksum of the manifest.
    """
    if source is None or "://" not in source:
        return source
    bucket, manifest = find_exported(source)
    fetch(bucket, manifest, into)
    return str(into)
