"""Retention: which committed checkpoints are deleted, and in which order."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from trainer.bucket.attempts import Attempt
from trainer.bucket.layout import CHECKPOINTS_PREFIX, commit_key, upload_of
from trainer.bucket.manifest import Manifest, Unreadable, commits, is_of_later_release, sizes
from trainer.bucket.store import Bucket

MIN_KEPT = 2


class Outdated(NamedTuple):
    """What retention deletes."""

    kept: tuple[int, ...]
    """Steps of the checkpoints that stay, newest first."""
    steps: tuple[int, ...]
    """Steps whose manifests are deleted first, in order."""
    keys: tuple[str, ...]
    """Files that no manifest names afterwards, in order."""
    bytes: int
    """Total size of those files."""
    folders: tuple[str, ...] = ()
    """Subfolders without a manifest, if the bucket is a folder. Killed uploads leave files in them that no listing shows."""


def prune(bucket: Bucket, attempt: Attempt, keep: int, *, rejected: Collection[int] = ()) -> list[int]:
    """Delete all checkpoints but the newest `keep` (at least 2) that are complete.

    Manifests are deleted first, then files, so that no manifest ever names a deleted file.

    Files that no manifest names are deleted too, if they are below the newest commit and no attempt can be uploading
    them. These are files of earlier attempts, and files of this attempt below its own newest commit. So this function
    must not run at the same time as a commit of this attempt.

    Args:
        bucket: the run's.
        attempt: the owner of the run.
        keep: number of checkpoints that stay.
        rejected: steps that did not verify when this attempt read them; other attempts' commits of them do not count.

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


def outdated(bucket: Bucket, attempt: int, keep: int, *, rejected: Collection[int] = ()) -> Outdated:
    """Return what `prune` would delete for the attempt of that number; deletes nothing."""
    found = list(commits(bucket))
    stored = sizes(bucket, CHECKPOINTS_PREFIX)
    complete = [
        manifest
        for manifest in found
        if isinstance(manifest, Manifest)
        and not manifest.fault(stored)
        and (manifest.step not in rejected or manifest.attempt == attempt)
    ]
    if len(complete) < MIN_KEPT:
        return Outdated(tuple(manifest.step for manifest in complete), (), (), 0)
    kept = complete[: max(keep, MIN_KEPT)]
    # Commits above the newest complete one look damaged. They stay, so that users can inspect them.
    # Commits in a later release's format stay too, because this release cannot tell whether they are complete.
    newest, stay = kept[0].step, {manifest.step for manifest in (*kept, *filter(is_of_later_release, found))}
    doomed = [manifest.step for manifest in found if manifest.step < newest and manifest.step not in stay]
    # Of the files, delete those that no remaining manifest names and no attempt can be uploading.
    remaining = [manifest for manifest in found if manifest.step not in doomed]
    named = _named_files(remaining)
    in_use = {manifest.prefix for manifest in remaining if isinstance(manifest, Manifest)}
    keys = tuple(sorted(key for key in stored if key not in named and _is_garbage(key, attempt, kept)))
    return Outdated(
        tuple(manifest.step for manifest in kept),
        tuple(sorted(doomed)),
        keys,
        sum(stored[key] for key in keys),
        tuple(
            prefix
            for prefix in bucket.folders(CHECKPOINTS_PREFIX)
            if prefix not in in_use and _is_garbage(prefix, attempt, kept)
        ),
    )


def _named_files(manifests: list[Manifest | Unreadable]) -> set[str]:
    readable = [manifest for manifest in manifests if isinstance(manifest, Manifest)]
    return {manifest.prefix + file.path for manifest in readable for file in manifest.files}


def _is_garbage(key: str, attempt: int, kept: list[Manifest]) -> bool:
    """Return whether no attempt can be uploading a file that no manifest names."""
    if (upload := upload_of(key)) is None:
        return False
    if upload.attempt == attempt:
        return any(upload.step < manifest.step for manifest in kept if manifest.attempt == attempt)
    return upload.attempt < attempt and upload.step < kept[0].step
