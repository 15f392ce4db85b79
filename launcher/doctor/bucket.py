"""Check the bucket of a run by writing, listing, reading and deleting a probe object."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from launcher.doctor.findings import Finding
from trainer.bucket import Bucket, open_run
from trainer.bucket.address import Patience, folder_of
from trainer.errors import BucketError

PROBE = "doctor"
PATIENCE = Patience(open_s=8.0, transfer_s=8.0, request_s=8.0)
NO_CONDITIONS = "two machines that start the same run at once would not notice each other: start a run from one place only"


def check_bucket(checkpoints: str, *, from_other_machines: bool) -> list[Finding]:
    """Check that the bucket is reachable and writable, and that it supports conditional writes; leave nothing behind.

    Args:
        checkpoints: address of the folder of runs.
        from_other_machines: whether the run is on another machine, which must reach the bucket too.

    Raises:
        BucketError, Unavailable: it cannot be reached, or it denies access.
    """
    if from_other_machines and folder_of(checkpoints) is not None:
        detail = f"checkpoints would go to {checkpoints}, a folder of this machine that other machines cannot reach"
        hint = 'use `--checkpoints gs://BUCKET/runs`, or `checkpoints = "gs://BUCKET/runs"` in the settings'
        return [Finding(name="bucket", status="missing", detail=detail, hint=hint)]
    with _probe_run(checkpoints) as bucket:
        return [_check_access(bucket, checkpoints), _check_conditional_put(bucket)]


def _check_access(bucket: Bucket, checkpoints: str) -> Finding:
    content = uuid.uuid4().hex.encode()
    bucket.put(PROBE, content)
    if bucket.get(PROBE) != content or [item.key for item in bucket.list()] != [PROBE]:
        raise BucketError(
            f"{checkpoints} does not return what was written to it",
            hint="the store does not read its own writes: use another bucket",
        )
    return Finding(name="bucket", status="ok", detail=f"{checkpoints}: write, list, read and delete work")


def _check_conditional_put(bucket: Bucket) -> Finding:
    name = "conditional put"
    if bucket.keeps_first(PROBE, bucket.get(PROBE)):
        return Finding(name=name, status="ok", detail="supported: only one attempt can own a run")
    detail = "the store ignores it"
    return Finding(name=name, status="failed", detail=detail, hint=NO_CONDITIONS, needed=False)


@contextlib.contextmanager
def _probe_run(checkpoints: str) -> Iterator[Bucket]:
    """Open a temporary run and delete it afterwards, with every local folder that was created for it."""
    run_id = f".{PROBE}-{uuid.uuid4().hex[:12]}"
    folder = folder_of(checkpoints)
    path = folder.expanduser().absolute() / run_id if folder is not None else None
    created = [parent for parent in (path, *path.parents) if not parent.exists()] if path else []
    try:
        bucket = open_run(checkpoints, run_id, patience=PATIENCE)
        try:
            yield bucket
        finally:
            bucket.delete([PROBE])
    finally:
        _remove_folders(created)


def _remove_folders(created: list[Path]) -> None:
    for folder in created:
        with contextlib.suppress(OSError):
            folder.rmdir()
