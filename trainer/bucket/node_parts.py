"""Checkpoints of several nodes: each uploads what it wrote and says so, and node 0 commits when all have.

    checkpoints/step-00000100/0003/...              files of attempt 3, from all nodes
    checkpoints/step-00000100/0003/.parts/0001.json what node 1 uploaded: its files with sizes and checksums

A part makes nothing a checkpoint: until node 0 has created the manifest over all parts, what lies there
is what no manifest names, and retention clears it away as such.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.bucket.attempts import Attempt
from trainer.bucket.commit import upload_files
from trainer.bucket.layout import CHECKPOINTS_PREFIX, commit_key, node_part_key, node_part_of
from trainer.bucket.manifest import File, Manifest, files_prefix, read
from trainer.bucket.store import Bucket
from trainer.errors import Unavailable
from trainer.staged import Staged

log = logging.getLogger(__name__)
FIRST_POLL_S = 0.1


class Node(NamedTuple):
    """Which of the machines that train together this one is."""

    rank: int = 0
    nodes: int = 1


class Waiting(NamedTuple):
    """How node 0 waits for the parts of the others."""

    poll_s: float = 2.0
    """Between two looks, which are paid by the request; the first ones come sooner."""
    patience_s: float = 30 * 60.0
    """Nodes save at the same step, so they differ by their network alone; a node that is lost ends the whole
    attempt long before."""
    sleep: Callable[[float], None] = time.sleep
    gone: Callable[[], str | None] = lambda: None
    """Why a part that is missing will never come."""


WAITING = Waiting()


class NodePart(BaseModel):
    """What one node uploaded of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    node: int
    files: tuple[File, ...]


class Skipped(Exception):
    """A node is gone, or has left this step out and uploaded a later one: it will never be whole."""


class _UploadedParts(NamedTuple):
    there: set[int]
    """Nodes whose part of the step has been uploaded."""
    beyond: dict[int, int]
    """Of the others, those that have uploaded a later step: node and step."""


def upload_part(bucket: Bucket, attempt: Attempt, staging: Path, staged: Staged, *, node: int) -> NodePart:
    """Upload what this node wrote of a checkpoint, then say so.

    Raises:
        ValueError: called for node 0, which commits instead.
        Superseded, BucketError, Unavailable: as `commit`; the same call may be made again.
    """
    if node < 1:
        raise ValueError(f"node {node} uploads no part: node 0 commits")
    attempt.check()
    there = read(bucket, commit_key(staged.step))
    if isinstance(there, Manifest) and there.attempt == attempt.number:
        return NodePart(node=node, files=())  # all parts were there, ours among them
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
    """Wait for the parts of nodes 1 to `nodes` - 1; what they uploaded.

    Raises:
        Skipped: a node is gone, or went on to a later step without this one.
        Superseded: a newer attempt has claimed the run meanwhile.
        Unavailable: a part did not come within the patience, or cannot be read.
    """
    wanted = set(range(1, nodes))
    waited_s, pause_s = 0.0, min(FIRST_POLL_S, waiting.poll_s)
    while missing := wanted - (found := _look(bucket, attempt.number, staged.step)).there:
        for node, step in sorted(found.beyond.items()):
            if node in missing:
                raise Skipped(f"node {node} left step {staged.step} out and uploaded step {step}")
        if reason := waiting.gone():
            raise Skipped(f"step {staged.step} is not whole: {reason}")
        if waited_s >= waiting.patience_s:
            nodes_missing = ", ".join(map(str, sorted(missing)))
            raise Unavailable(
                f"step {staged.step} is not committed: no part of node {nodes_missing} of {nodes} in {waited_s:.0f} s",
                hint="look at that node's log; the step before stays the newest checkpoint",
            )
        waiting.sleep(pause_s)
        waited_s, pause_s = waited_s + pause_s, min(2 * pause_s, waiting.poll_s)
        attempt.check()
    return tuple(file for node in sorted(wanted) for file in _part(bucket, attempt, staged, node).files)


def _look(bucket: Bucket, attempt: int, step: int) -> _UploadedParts:
    """One listing."""
    there: set[int] = set()
    beyond: dict[int, int] = {}
    parts = (node_part_of(object_.key) for object_ in bucket.list(CHECKPOINTS_PREFIX))
    for part in (part for part in parts if part and part.attempt == attempt):
        if part.step == step:
            there.add(part.node)
        elif part.step > step:
            beyond[part.node] = part.step
    return _UploadedParts(there, beyond)


def _part(bucket: Bucket, attempt: Attempt, staged: Staged, node: int) -> NodePart:
    key = node_part_key(staged.step, attempt.number, node)
    try:
        return NodePart.model_validate_json(bucket.get(key))
    except (FileNotFoundError, ValidationError) as error:
        raise Unavailable(f"{bucket.uri}/{key} cannot be read: {type(error).__name__}") from None
