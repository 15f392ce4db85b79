"""Checkpoints on their way into the bucket, and out of it when they are old."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

from trainer.bucket.attempts import Attempt
from trainer.bucket.layout import FINAL_COMMIT_KEY, commit_key
from trainer.bucket.manifest import (
    File,
    Manifest,
    files_prefix,
    read,
    sizes,
)
from trainer.bucket.store import LARGE_AT_ONCE, PART_BYTES, SMALL_AT_ONCE, Bucket, in_parallel
from trainer.errors import Superseded
from trainer.staged import Staged

log = logging.getLogger(__name__)


def commit(  # noqa: PLR0913 (what is saved, for whom, and two moments in between)
    bucket: Bucket,
    attempt: Attempt,
    staging: Path,
    staged: Staged,
    recipe_digest: str,
    *,
    ready: Callable[[], None] = lambda: None,
    others: Callable[[], tuple[File, ...]] = tuple,
) -> Manifest:
    """Upload a staged folder and make it a checkpoint, or the final model.

    The files are uploaded, then the manifest is created. Files under a manifest are never written to, so if the step has
    one already, it is

    - this attempt's, with all files in place (a commit whose answer was lost, or a second save of
      the step), or anybody's final model: nothing is uploaded, since training is exact;
    - the same with files missing: the manifest is deleted first, then all is uploaded anew;
    - an earlier attempt's checkpoint: training went on from below it, so it was not believed then,
      perhaps for a checksum that a listing cannot show. Ours goes into our own folder and replaces
      the manifest in one write. Both are the same step, whichever manifest a reader sees.

    `others` is called when ours are uploaded: it waits for those of the other nodes (`trainer.bucket.node_parts`).
    Then `ready` is: what a reader of the commit must find in the bucket besides its files is written there.

    Raises:
        Superseded: a newer attempt has claimed the run; nothing was committed.
        ValueError: the staged folder holds no files; or two nodes wrote different ones under one name.
        BucketError, Unavailable: as in `Bucket`; nothing was committed, and the same call may be made again.
    """
    prefix = files_prefix(staged.kind, staged.step, attempt.number)
    attempt.check()  # an attempt that slept while another took over uploads nothing
    if done := _already_committed(bucket, attempt, staged):
        return done
    # `final/` is shared by all attempts: see trainer.bucket.manifest
    each = attempt.check if staged.kind == "final" else _nothing
    ours = upload_files(bucket, prefix, staging / staged.folder, before_each=each)
    manifest = Manifest(
        run_id=bucket.run_id,
        attempt=attempt.number,
        step=staged.step,
        kind="final" if staged.kind == "final" else "checkpoint",
        created=datetime.now(UTC),
        recipe=recipe_digest,
        details=staged.details,
        files=merged((ours, others())),
    )
    ready()
    attempt.check()
    _publish(bucket, manifest)
    return manifest


def _nothing() -> None:
    """Nothing has to be looked at."""


def upload_files(
    bucket: Bucket, prefix: str, folder: Path, *, before_each: Callable[[], None] = _nothing
) -> tuple[File, ...]:
    """Bring all files of a folder, by path: large ones few at a time, each in many parts; then the others, many
    at a time. Memory is bounded.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no files to commit")

    def upload(path: Path) -> File:
        before_each()
        name = path.relative_to(folder).as_posix()
        sent = bucket.upload(prefix + name, path)
        return File(path=name, size=sent.size, xxh3=sent.xxh3)

    large = [path for path in paths if path.stat().st_size > PART_BYTES]
    small = [path for path in paths if path not in set(large)]
    files = in_parallel(upload, large, threads=LARGE_AT_ONCE)
    files += in_parallel(upload, small, threads=SMALL_AT_ONCE)
    return tuple(sorted(files, key=lambda file: file.path))


def merged(parts: Iterable[tuple[File, ...]]) -> tuple[File, ...]:
    """The files of all nodes, by path; one that several nodes wrote alike counts once.

    Raises:
        ValueError: two nodes wrote different bytes under one name, of which the bucket holds one only.
    """
    files: dict[str, File] = {}
    for file in (file for part in parts for file in part):
        if (other := files.setdefault(file.path, file)) != file:
            raise ValueError(
                f"two nodes wrote {file.path}: {other.size} bytes with xxh3 {other.xxh3}, and {file.size} with {file.xxh3}"
            )
    return tuple(files[path] for path in sorted(files))


def _already_committed(bucket: Bucket, attempt: Attempt, staged: Staged) -> Manifest | None:
    """The manifest that makes an upload needless; one that is not whole is taken back."""
    key = FINAL_COMMIT_KEY if staged.kind == "final" else commit_key(staged.step)
    manifest = read(bucket, key)
    if not isinstance(manifest, Manifest):
        return None
    if staged.kind == "checkpoint" and manifest.attempt != attempt.number:
        return None
    attempt.check()
    fault = manifest.fault(sizes(bucket, manifest.prefix))
    if fault is None:
        log.info("%s was committed by attempt %d already: nothing is uploaded", key, manifest.attempt)
        return manifest
    log.warning("%s was committed by attempt %d, but %s: it is uploaded anew", key, manifest.attempt, fault)
    bucket.delete([key])
    return None


def _publish(bucket: Bucket, manifest: Manifest) -> None:
    """Create the manifest, or replace one of an earlier attempt.

    Should a newer attempt replace it between our look and our write, ours wins, and is as good.
    """
    data = manifest.model_dump_json(indent=1).encode()
    if bucket.create(manifest.key, data):
        return
    there = read(bucket, manifest.key)
    if isinstance(there, Manifest) and there.attempt > manifest.attempt:
        raise Superseded(
            f"attempt {manifest.attempt} of run {manifest.run_id} is superseded: attempt {there.attempt} has"
            f" committed {manifest.key}"
        )
    if isinstance(there, Manifest) and there.attempt == manifest.attempt:
        return  # our own, from a try whose answer was lost
    log.info("%s replaces that of an earlier attempt", manifest.key)
    bucket.put(manifest.key, data)
