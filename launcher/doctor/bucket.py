"""Whether runs can be kept in a bucket: tried with an object of our own, which is taken away again."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from launcher.doctor.check import Finding
from trainer.bucket import Bucket, open_run
from trainer.bucket.address import Patience, folder_of
from trainer.errors import BucketError

PROBE = "doctor"
PATIENCE = Patience(open_s=8.0, transfer_s=8.0, request_s=8.0)
CONDITIONS = (
    "several controllers of one run would not see each other at once: start a run from one place at a time"
)


def look(checkpoints: str, *, elsewhere: bool) -> list[Finding]:
    """Reachable, writable, and whether it honours a conditional put; leaves nothing behind.

    Args:
        checkpoints: address of the folder of runs.
        elsewhere: whether other machines are to reach it.

    Raises:
        BucketError, Unavailable: it cannot be reached, or refuses us.
    """
    if elsewhere and folder_of(checkpoints) is not None:
        said = f"checkpoints would go to {checkpoints}, a folder of this machine, which others cannot reach"
        hint = '`--checkpoints gs://BUCKET/runs`, or `checkpoints = "gs://BUCKET/runs"` in the settings'
        return [Finding(name="bucket", status="missing", said=said, hint=hint)]
    with _probe(checkpoints) as bucket:
        return [_written(bucket, checkpoints), _conditions(bucket)]


def _written(bucket: Bucket, checkpoints: str) -> Finding:
    sent = uuid.uuid4().hex.encode()
    bucket.put(PROBE, sent)
    if bucket.get(PROBE) != sent or [item.key for item in bucket.list()] != [PROBE]:
        raise BucketError(f"{checkpoints} does not give back what was written to it")
    return Finding(name="bucket", status="ok", said=f"{checkpoints} is written to, listed, read and cleared")


def _conditions(bucket: Bucket) -> Finding:
    name = "conditional put"
    if bucket.keeps_first(PROBE, bucket.get(PROBE)):
        return Finding(name=name, status="ok", said="honoured: a run has one owner")
    said = "the store ignores it"
    return Finding(name=name, status="failed", said=said, hint=CONDITIONS, needed=False)


@contextlib.contextmanager
def _probe(checkpoints: str) -> Iterator[Bucket]:
    """A run of nobody's; of a folder, also the folders that had to be made for it go again."""
    run_id = f".{PROBE}-{uuid.uuid4().hex[:12]}"
    folder = folder_of(checkpoints)
    path = folder.expanduser().absolute() / run_id if folder is not None else None
    made = [each for each in (path, *path.parents) if not each.exists()] if path else []
    try:
        bucket = open_run(checkpoints, run_id, patience=PATIENCE)
        try:
            yield bucket
        finally:
            bucket.delete([PROBE])
    finally:
        _clear(made)


def _clear(made: list[Path]) -> None:
    for each in made:
        with contextlib.suppress(OSError):
            each.rmdir()
