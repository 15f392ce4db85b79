"""Checkpoints and models on their way out of the bucket: nothing is handed over that does not verify."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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
from trainer.bucket.store import (
    SMALL_AT_ONCE,
    Bucket,
    Checked,
    ignore_progress,
    in_parallel,
    open_run,
)
from trainer.errors import ModelError, UserError

log = logging.getLogger(__name__)
FILES_AT_ONCE = SMALL_AT_ONCE
Tell = Callable[[int], object]


class CorruptCheckpoint(UserError):
    """A file that does not have the size or checksum that its manifest says."""


class Restored(NamedTuple):
    """A checkpoint that was brought here and verified."""

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
    tell: Tell = ignore_progress,
) -> Restored | None:
    """Bring the newest checkpoint that verifies.

    Args:
        bucket: the run's.
        into: folder for it; the checkpoint becomes `into/checkpoint-<step>`.
        reject: told the step of each newer one that does not verify, and why: file, expected, got.
        trying: told each one that is about to be brought.
        tell: as in `fetch`.

    Returns:
        None if there is no checkpoint, or none that verifies.

    Raises:
        BucketError, Unavailable: the store cannot be read; that is no verdict on a checkpoint.
    """
    began = time.monotonic()
    for manifest in commits(bucket):
        if isinstance(manifest, Unreadable):
            reject(manifest.step, manifest.reason)
            continue
        if fault := manifest.fault(sizes(bucket, manifest.prefix)):
            reject(manifest.step, fault)
            continue
        trying(manifest)
        try:
            return _bring_whole(bucket, manifest, into, began, tell)
        except CorruptCheckpoint as error:
            reject(manifest.step, error.message)
    return None


def restore_named(
    bucket: Bucket, step: int, attempt: int, into: Path, tell: Tell = ignore_progress
) -> Restored:
    """Bring the checkpoint of a step that an attempt committed, to `into/checkpoint-<step>`; `tell` as in `fetch`.

    Raises:
        CorruptCheckpoint: its manifest is not there, or a file does not verify.
        BucketError, Unavailable: as `restore`.
    """
    began = time.monotonic()
    manifest = read(bucket, commit_key(step), step)
    if not isinstance(manifest, Manifest) or manifest.attempt != attempt:
        found = (
            manifest.reason
            if isinstance(manifest, Unreadable)
            else f"{commit_key(step)} is another's or gone"
        )
        raise CorruptCheckpoint(f"attempt {attempt} committed no step {step} that can be read: {found}")
    return _bring_whole(bucket, manifest, into, began, tell)


def _bring_whole(bucket: Bucket, manifest: Manifest, into: Path, began: float, tell: Tell) -> Restored:
    path = into / f"checkpoint-{manifest.step}"
    fetch(bucket, manifest, path, tell)
    return Restored(manifest, path, manifest.size, time.monotonic() - began)


def fetch(bucket: Bucket, manifest: CommittedFiles, into: Path, tell: Tell = ignore_progress) -> None:
    """Bring a manifest's files; `into` appears when all have verified, or not at all.

    `tell` hears the bytes of each piece on the threads that move them; what it raises ends it all.

    Raises:
        CorruptCheckpoint: names the file, what was expected and what came.
        FileExistsError: `into` holds something already.
        BucketError, Unavailable: as in `Bucket`.
    """
    if into.exists() and any(into.iterdir()):
        raise FileExistsError(f"{into} is not empty")
    partial = into.with_name(f".{into.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        in_parallel(
            lambda file: _bring(bucket, manifest, file, partial, tell), manifest.files, threads=FILES_AT_ONCE
        )
        partial.replace(into)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def mismatch(key: str, file: File, got: Checked | None) -> str | None:
    """Why what lay at `key` is not the manifest's file; None if it is. `got` is None if nothing lay there."""
    if got is None:
        return f"{key} is missing, expected {file.size} bytes"
    if got == (file.size, file.xxh3):
        return None
    return (
        f"{key}: expected {file.size} bytes with xxh3 {file.xxh3}, got {got.size} bytes with xxh3 {got.xxh3}"
    )


def _bring(bucket: Bucket, manifest: CommittedFiles, file: File, into: Path, tell: Tell) -> None:
    key = manifest.prefix + file.path
    try:
        got = bucket.download(key, into / file.path, tell)
    except FileNotFoundError:
        got = None
    if reason := mismatch(key, file, got):
        raise CorruptCheckpoint(
            reason, hint="the copy in the bucket is damaged; an older checkpoint may be whole"
        )


def find_exported(uri: str) -> tuple[Bucket, Manifest]:
    """The run's bucket, and the manifest of its final model.

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
