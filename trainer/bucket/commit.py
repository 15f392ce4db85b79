"""Commits: staged folders become checkpoints, or the final model, in the bucket.

When several nodes train together, each node uploads the files that it wrote, and node 0 commits when all have.

    checkpoints/step-00000100/0003/...              files of attempt 3, from all nodes
    checkpoints/step-00000100/0003/.parts/0001.json the files that node 1 uploaded, with sizes and checksums

A part is no checkpoint. Until node 0 has created the manifest over all parts, no manifest names the uploaded files, and
retention removes them like other unnamed files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.bucket.attempts import Attempt
from trainer.bucket.byte_streams import LARGE_AT_ONCE, PART_BYTES, SMALL_AT_ONCE, in_parallel
from trainer.bucket.layout import (
    CHECKPOINTS_PREFIX,
    FINAL_COMMIT_KEY,
    commit_key,
    node_part_key,
    node_part_of,
)
from trainer.bucket.manifest import File, Manifest, files_prefix, read, sizes
from trainer.bucket.store import Bucket
from trainer.errors import Superseded, Unavailable
from trainer.release import own_version
from trainer.staged import Staged

log = logging.getLogger(__name__)
FIRST_POLL_S = 0.1


class Node(NamedTuple):
    """The rank of this machine among the machines that train together."""

    rank: int = 0
    nodes: int = 1


class Waiting(NamedTuple):
    """How node 0 waits for the parts of the other nodes."""

    poll_s: float = 2.0
    """Seconds between two listings, which stores charge for. The first polls are more frequent."""
    patience_s: float = 30 * 60.0
    """The timeout. All nodes save at the same step, so only their networks differ. A lost node ends the whole attempt
    long before the timeout."""
    sleep: Callable[[float], None] = time.sleep
    gone: Callable[[], str | None] = lambda: None
    """Returns the reason why a missing part will never come, or None."""


WAITING = Waiting()


class NodePart(BaseModel):
    """The files that one node uploaded of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    node: int
    files: tuple[File, ...]


class Skipped(Exception):
    """The checkpoint will never be complete: a node is gone, or skipped this step and uploaded a later one."""


class _UploadedParts(NamedTuple):
    nodes: set[int]
    """Nodes that have uploaded their part of the step."""
    beyond: dict[int, int]
    """Nodes that have uploaded a later step, and that step."""


def commit(  # noqa: PLR0913 (what is saved, for which run, and two callbacks)
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

    The files are uploaded first, then the manifest is created. Files that a manifest names are never written to. So if
    the step has a manifest already, it is one of these:

    - This attempt's manifest, with all files in place (the answer to a commit was lost, or the step was saved twice), or
      any attempt's final model. Nothing is uploaded, since training is exact.
    - The same, but files are missing. The manifest is deleted, then everything is uploaded anew.
    - An earlier attempt's checkpoint. Training resumed from below it, so that attempt's files did not verify then,
      perhaps for a checksum that a listing cannot show. Our files go into our own folder, and our manifest replaces the
      old one in one write. Both describe the same step, whichever manifest a reader gets.

    Args:
        bucket: the run's.
        attempt: the attempt that saves.
        staging: the folder that holds the staged folder.
        staged: the marker of the staged folder.
        recipe_digest: digest of the run's recipe.
        ready: called before the commit, to write what readers of the commit must find in the bucket besides its files.
        others: called when our files are uploaded; waits for the files of the other nodes and returns them.

    Raises:
        Superseded: a newer attempt has claimed the run; nothing was committed.
        ValueError: the staged folder has no files, or two nodes wrote different files under one name.
        BucketError, Unavailable: as in `Bucket`; nothing was committed, and the same call may be repeated.
    """
    prefix = files_prefix(staged.kind, staged.step, attempt.number)
    attempt.check()  # an attempt that slept while another took over uploads nothing
    if done := _already_committed(bucket, attempt, staged):
        return done
    # All attempts share `final/`: see trainer.bucket.manifest
    before_each = attempt.check if staged.kind == "final" else _no_check
    ours = upload_files(bucket, prefix, staging / staged.folder, before_each=before_each)
    manifest = Manifest(
        run_id=bucket.run_id,
        attempt=attempt.number,
        step=staged.step,
        kind="final" if staged.kind == "final" else "checkpoint",
        created=datetime.now(UTC),
        recipe=recipe_digest,
        format=staged.format,
        release=own_version(),
        details=staged.details,
        files=merged((ours, others())),
    )
    ready()
    attempt.check()
    _publish(bucket, manifest)
    return manifest


def upload_part(bucket: Bucket, attempt: Attempt, staging: Path, staged: Staged, *, node: int) -> NodePart:
    """Upload the files that this node wrote of a checkpoint, then the list of them.

    Raises:
        ValueError: called for node 0, which commits instead.
        Superseded, BucketError, Unavailable: as `commit`; the same call may be repeated.
    """
    if node < 1:
        raise ValueError(f"node {node} uploads no part: node 0 commits")
    attempt.check()
    existing = read(bucket, commit_key(staged.step))
    if isinstance(existing, Manifest) and existing.attempt == attempt.number:
        return NodePart(node=node, files=())  # node 0 had all parts, including ours
    prefix = files_prefix(staged.kind, staged.step, attempt.number)
    part = NodePart(node=node, files=upload_files(bucket, prefix, staging / staged.folder))
    attempt.check()
    bucket.put(node_part_key(staged.step, attempt.number, node), part.model_dump_json(indent=1).encode())
    return part


def gather(
    bucket: Bucket,
    attempt: Attempt,
    staged: Staged,
    *,
    nodes: int,
    waiting: Waiting = WAITING,
) -> tuple[File, ...]:
    """Wait for the parts of nodes 1 to `nodes` - 1 and return the files in them.

    Raises:
        Skipped: a node is gone, or uploaded a later step without this one.
        Superseded: a newer attempt has claimed the run meanwhile.
        Unavailable: a part did not come before the timeout, or cannot be read.
    """
    wanted = set(range(1, nodes))
    waited_s, pause_s = 0.0, min(FIRST_POLL_S, waiting.poll_s)
    while missing := wanted - (found := _uploaded_parts(bucket, attempt.number, staged.step)).nodes:
        # A node that has uploaded a later step will never upload this one.
        for node, step in sorted(found.beyond.items()):
            if node in missing:
                raise Skipped(f"node {node} left step {staged.step} out and uploaded step {step}")
        if reason := waiting.gone():
            raise Skipped(f"step {staged.step} is incomplete: {reason}")
        if waited_s >= waiting.patience_s:
            nodes_missing = ", ".join(map(str, sorted(missing)))
            raise Unavailable(
                f"step {staged.step} is not committed: no part of node {nodes_missing} of {nodes} in {waited_s:.0f} s",
                hint="look at that node's log; the previous checkpoint stays the newest one",
            )
        waiting.sleep(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, waiting.poll_s)
        attempt.check()
    return tuple(file for node in sorted(wanted) for file in _read_part(bucket, attempt, staged, node).files)


def upload_files(
    bucket: Bucket, prefix: str, folder: Path, *, before_each: Callable[[], None] = lambda: None
) -> tuple[File, ...]:
    """Upload all files of a folder and return them sorted by path.

    Large files come first: few at a time, each in many concurrent parts. The others follow, many at a time. So the
    memory in use is bounded. `before_each` is called before each file.

    Raises:
        ValueError: the folder has no files.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no files to commit")

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
    """Return the files of all nodes sorted by path. A file that several nodes wrote alike counts once.

    Raises:
        ValueError: two nodes wrote different bytes under one name, and the bucket has only one of the two files.
    """
    files: dict[str, File] = {}
    for file in (file for part in parts for file in part):
        if (other := files.setdefault(file.path, file)) != file:
            raise ValueError(
                f"two nodes wrote {file.path}: {other.size} bytes with xxh3 {other.xxh3}, and {file.size} with {file.xxh3}"
            )
    return tuple(files[path] for path in sorted(files))


def _no_check() -> None:
    """A no-op: files of a checkpoint go into the attempt's own folder."""


def _already_committed(bucket: Bucket, attempt: Attempt, staged: Staged) -> Manifest | None:
    """Return the manifest that makes an upload unnecessary, or None. Deletes our manifest if files are missing."""
    key = FINAL_COMMIT_KEY if staged.kind == "final" else commit_key(staged.step)
    manifest = read(bucket, key)
    if not isinstance(manifest, Manifest):
        return None
    if staged.kind == "checkpoint" and manifest.attempt != attempt.number:
        return None
    manifest.refuse_unknown()
    attempt.check()
    fault = manifest.fault(sizes(bucket, manifest.prefix))
    if fault is None:
        log.info("attempt %d committed %s already: nothing is uploaded", manifest.attempt, key)
        return manifest
    log.warning("attempt %d committed %s, but %s: it is uploaded again", manifest.attempt, key, fault)
    bucket.delete([key])
    return None


def _publish(bucket: Bucket, manifest: Manifest) -> None:
    """Create the manifest, or replace one of an earlier attempt.

    A newer attempt may replace the manifest between our read and our write. Then ours wins, and is as good.
    """
    data = manifest.model_dump_json(indent=1).encode()
    if bucket.create(manifest.key, data):
        return
    existing = read(bucket, manifest.key)
    if isinstance(existing, Manifest) and existing.attempt > manifest.attempt:
        raise Superseded(
            f"attempt {manifest.attempt} of run {manifest.run_id} is superseded: attempt {existing.attempt} has"
            f" committed {manifest.key}"
        )
    if isinstance(existing, Manifest) and existing.attempt == manifest.attempt:
        return  # ours, from a try whose answer was lost
    log.info("%s replaces the manifest of an earlier attempt", manifest.key)
    bucket.put(manifest.key, data)


def _uploaded_parts(bucket: Bucket, attempt: int, step: int) -> _UploadedParts:
    """Return which nodes have uploaded this step or a later one, from one listing."""
    uploaded = _UploadedParts(set(), {})
    parts = (node_part_of(object_.key) for object_ in bucket.list(CHECKPOINTS_PREFIX))
    for part in (part for part in parts if part and part.attempt == attempt):
        if part.step == step:
            uploaded.nodes.add(part.node)
        elif part.step > step:
            uploaded.beyond[part.node] = part.step
    return uploaded


def _read_part(bucket: Bucket, attempt: Attempt, staged: Staged, node: int) -> NodePart:
    key = node_part_key(staged.step, attempt.number, node)
    try:
        return NodePart.model_validate_json(bucket.get(key))
    except (FileNotFoundError, ValidationError) as error:
        raise Unavailable(f"{bucket.uri}/{key} cannot be read: {type(error).__name__}") from None
