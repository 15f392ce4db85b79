"""Retention: which committed checkpoints are deleted, and in which order."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from trainer.bucket.attempts import Attempt
from trainer.bucket.layout import CHECKPOINTS_PREFIX, commit_key, upload_of
from trainer.bucket.manifest import Manifest, Unreadable, commits, sizes
from trainer.bucket.store import Bucket

MIN_KEPT = 2


def prune(bucket: Bucket, attempt: Attempt, keep: int, *, rejected: Collection[int] = ()) -> list[int]:
    """Delete all checkpoints but the newest `keep` (at least 2) whose files are all there.

    Steps in `rejected` did not verify when this attempt read them: what others have committed of them does not count.

    Manifests go first, then files, so that no manifest ever names a file that we deleted. Files
    that no manifest names go too, if they are below the newest commit and nobody can be uploading
    them: those of earlier attempts, and of this one below its own newest commit. Must not run at
    the same time as this attempt's own commits.

    Returns:
        The steps whose checkpoints were deleted, in order.

    Raises:
        Superseded: a newer attempt has claimed the run; nothing was deleted.
    """
    attempt.check()
    old = outdated(bucket, attempt.number, keep, rejected=rejected)
    bucket.delete(commit_key(step) for step in old.steps)
    bucket.delete(old.keys)
    for prefix in old.folders:
        bucket.clear(prefix)
    return list(old.steps)


class Outdated(NamedTuple):
    """What retention has no use for."""

    kept: tuple[int, ...]
    """Steps of the checkpoints that stay, newest first."""
    steps: tuple[int, ...]
    """Steps whose manifests go first, in order."""
    keys: tuple[str, ...]
    """Files that then no manifest names, in order."""
    bytes: int
    """Of those files."""
    folders: tuple[str, ...] = ()
    """Of a bucket that is a folder, those in which no manifest names anything: killed uploads leave files that no
    listing shows."""


def outdated(bucket: Bucket, attempt: int, keep: int, *, rejected: Collection[int] = ()) -> Outdated:
    """What `prune` would delete for the attempt of that number; only looks."""
    found = list(commits(bucket))
    there = sizes(bucket, CHECKPOINTS_PREFIX)
    whole = [
        manifest
        for manifest in found
        if isinstance(manifest, Manifest)
        and not manifest.fault(there)
        and (manifest.step not in rejected or manifest.attempt == attempt)
    ]
    if len(whole) < MIN_KEPT:
        return Outdated(tuple(manifest.step for manifest in whole), (), (), 0)
    kept = whole[: max(keep, MIN_KEPT)]
    # Above the newest whole one, what looks broken stays for people to look at.
    newest, kept_steps = kept[0].step, {manifest.step for manifest in kept}
    doomed = [
        manifest.step for manifest in found if manifest.step < newest and manifest.step not in kept_steps
    ]
    stay = [manifest for manifest in found if manifest.step not in doomed]
    named, held = _named(stay), {manifest.prefix for manifest in stay if isinstance(manifest, Manifest)}
    keys = tuple(sorted(key for key in there if key not in named and _is_garbage(key, attempt, kept)))
    return Outdated(
        tuple(manifest.step for manifest in kept),
        tuple(sorted(doomed)),
        keys,
        sum(there[key] for key in keys),
        tuple(
            prefix
            for prefix in bucket.folders(CHECKPOINTS_PREFIX)
            if prefix not in held and _is_garbage(prefix, attempt, kept)
        ),
    )


def _named(manifests: list[Manifest | Unreadable]) -> set[str]:
    readable = [manifest for manifest in manifests if isinstance(manifest, Manifest)]
    return {manifest.prefix + file.path for manifest in readable for file in manifest.files}


def _is_garbage(key: str, attempt: int, kept: list[Manifest]) -> bool:
    """Whether a file that no manifest names is one that nobody can be uploading."""
    if (upload := upload_of(key)) is None:
        return False
    if upload.attempt == attempt:
        return any(upload.step < manifest.step for manifest in kept if manifest.attempt == attempt)
    return upload.attempt < attempt and upload.step < kept[0].step
