"""Checkpoints and models are read from the bucket, and only files that verify are used."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainer.bucket.byte_streams import SMALL_AT_ONCE, Checked, ignore_progress, in_parallel
from trainer.bucket.layout import commit_key, run_of_final
from trainer.bucket.manifest import (
    CommittedFiles,
    File,
    Manifest,
    Unreadable,
    commits,
    final,
    read,
    sizes,
)
from trainer.bucket.store import Bucket, open_run
from trainer.errors import ModelError, UserError

log = logging.getLogger(__name__)
FILES_AT_ONCE = SMALL_AT_ONCE
Progress = Callable[[int], object]
"""A callback for the bytes of each piece, on the threads that copy them. An exception from it cancels the transfer."""


class CorruptCheckpoint(UserError):
    """A file has another size or checksum than its manifest."""


class Restored(NamedTuple):
    """A downloaded and verified checkpoint."""

    manifest: Manifest
    path: Path
    """The folder with its files."""
    bytes: int
    seconds: float


def restore(
    bucket: Bucket,
    into: Path,
    reject: Callable[[int, str], None],
    trying: Callable[[Manifest], None] = lambda _: None,
    progress: Progress = ignore_progress,
) -> Restored | None:
    """Download the newest checkpoint that verifies.

    Args:
        bucket: the run's.
        into: parent folder; the checkpoint becomes `into/checkpoint-<step>`.
        reject: called with the step of each newer checkpoint that does not verify, and the reason: file, expected,
            got.
        trying: called with each manifest before its files are downloaded.
        progress: see `Progress`.

    Returns:
        None if there is no checkpoint that verifies.

    Raises:
        BucketError, Unavailable: the store cannot be read. No checkpoint was rejected for that.
        UserError: the newest checkpoint has the format of a later release. An older one is not used, because the run
            would lose steps and overwrite newer checkpoints.
    """
    began = time.monotonic()
    for manifest in commits(bucket):
        if isinstance(manifest, Unreadable):
            reject(manifest.step, manifest.reason)
            continue
        manifest.refuse_unknown()
        if fault := manifest.fault(sizes(bucket, manifest.prefix)):
            reject(manifest.step, fault)
            continue
        trying(manifest)
        try:
            return _restore_manifest(bucket, manifest, into, began, progress)
        except CorruptCheckpoint as error:
            reject(manifest.step, error.message)
    return None


def restore_named(
    bucket: Bucket, step: int, attempt: int, into: Path, progress: Progress = ignore_progress
) -> Restored:
    """Download the checkpoint of a step that an attempt committed, to `into/checkpoint-<step>`.

    Raises:
        CorruptCheckpoint: its manifest is missing, or a file does not verify.
        BucketError, Unavailable: as `restore`.
    """
    began = time.monotonic()
    manifest = read(bucket, commit_key(step), step)
    if not isinstance(manifest, Manifest) or manifest.attempt != attempt:
        found = (
            manifest.reason
            if isinstance(manifest, Unreadable)
            else f"{commit_key(step)} is missing, or belongs to another attempt"
        )
        raise CorruptCheckpoint(f"attempt {attempt} committed no step {step} that can be read: {found}")
    manifest.refuse_unknown()
    return _restore_manifest(bucket, manifest, into, began, progress)


def fetch(bucket: Bucket, manifest: CommittedFiles, into: Path, progress: Progress = ignore_progress) -> None:
    """Download a manifest's files. `into` appears only when all files have verified.

    Raises:
        CorruptCheckpoint: names the file, what was expected and what was read.
        FileExistsError: `into` has files already.
        BucketError, Unavailable: as in `Bucket`.
    """
    if into.exists() and any(into.iterdir()):
        raise FileExistsError(f"{into} is not empty")
    partial = into.with_name(f".{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        in_parallel(
            lambda file: _fetch_file(bucket, manifest, file, partial, progress),
            manifest.files,
            threads=FILES_AT_ONCE,
        )
        partial.replace(into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mismatch(key: str, file: File, got: Checked | None) -> str | None:
    """Return how the object at `key` differs from the manifest's file, or None. `got` is None for a missing object."""
    if got is None:
        return f"{key} is missing, expected {file.size} bytes"
    if got == (file.size, file.xxh3):
        return None
    return (
        f"{key}: expected {file.size} bytes with xxh3 {file.xxh3}, got {got.size} bytes with xxh3 {got.xxh3}"
    )


def find_exported(uri: str) -> tuple[Bucket, Manifest]:
    """Return the run's bucket and the manifest of its final model.

    Raises:
        ModelError: the URI is not that of a run's exported model, or the run has none yet.
        BucketError, Unavailable: as `open_run`.
    """
    runs, _, run_id = (run_of_final(uri) or "").rpartition("/")
    if not run_id:
        raise ModelError(
            f"model_name_or_path={uri} is not a run's model", hint="it ends with /<run id>/final"
        )
    bucket = open_run(runs, run_id)
    manifest = final(bucket)
    if manifest is None:
        raise ModelError(f"run {run_id} in {runs} has no final model yet", hint="finish that run first")
    return bucket, manifest


def _restore_manifest(
    bucket: Bucket, manifest: Manifest, into: Path, began: float, progress: Progress
) -> Restored:
    path = into / f"checkpoint-{manifest.step}"
    fetch(bucket, manifest, path, progress)
    return Restored(manifest, path, manifest.size, time.monotonic() - began)


def _fetch_file(bucket: Bucket, manifest: CommittedFiles, file: File, into: Path, progress: Progress) -> None:
    key = manifest.prefix + file.path
    try:
        got = bucket.download(key, into / file.path, progress)
    except FileNotFoundError:
        got = None
    if reason := mismatch(key, file, got):
        raise CorruptCheckpoint(
            reason, hint="the copy in the bucket is damaged; an older checkpoint may be intact"
        )
