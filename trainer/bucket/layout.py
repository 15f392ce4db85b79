"""The keys of a run's objects in its bucket: the only module that spells them.

Keys are relative to the folder of the run, except those below `reference/`, which all runs of a folder share.

    run.json                                       what the run trains: `trainer.run_record`
    attempts/0003.json                             the claim of attempt 3: `trainer.bucket.attempts`
    events/0003.jsonl                              what happened in attempt 3: `trainer.events`
    checkpoints/step-00000100/0003/...             files of step 100 that attempt 3 uploaded
    checkpoints/step-00000100/0003/.parts/0001.json
                                                   the files that node 1 uploaded of them
    commits/step-00000100.json                     manifest of step 100: `trainer.bucket.manifest`
    final/...                                      the exported model and its card
    commits/final.json                             manifest of the exported model
    reports/...                                    what W&B and TensorBoard wrote

    ../reference/<recipe>/...                      log-probabilities of DPO's reference: `trainer.bucket.reference_cache`

The formats must not change: older releases wrote the buckets that this release reads.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from trainer.errors import BucketError

RUN_ID = re.compile(r"(?!\.+$)[A-Za-z0-9._-]{1,200}")
"""The ids that runs in buckets may have."""
NEW_RUN_ID_LENGTH = 100
"""The most characters of a new id, because the names of jobs and local folders add to it. Older runs may have longer ids."""
RUN_KEY = "run.json"
ATTEMPTS_PREFIX = "attempts/"
EVENTS_PREFIX = "events/"
CHECKPOINTS_PREFIX = "checkpoints/"
COMMITS_PREFIX = "commits/"
FINAL_PREFIX = "final/"
FINAL_COMMIT_KEY = f"{COMMITS_PREFIX}final.json"
MODEL_CARD_KEY = f"{FINAL_PREFIX}README.md"
REPORTS_PREFIX = "reports/"
REFERENCE_FOLDER = "reference"
"""The folder beside the runs that holds their shared log-probabilities. It cannot be the id of a run."""
RUN_FOLDERS = frozenset(
    prefix.rstrip("/")
    for prefix in (ATTEMPTS_PREFIX, CHECKPOINTS_PREFIX, COMMITS_PREFIX, EVENTS_PREFIX, FINAL_PREFIX)
)
"""Folders by which a listing recognises a run."""

_PARTS = ".parts/"
_ATTEMPT = re.compile(rf"{ATTEMPTS_PREFIX}(\d+)\.json")
_EVENTS = re.compile(rf"{EVENTS_PREFIX}(\d+)\.jsonl")
_COMMIT = re.compile(rf"{COMMITS_PREFIX}step-(\d+)\.json")
_UPLOAD = re.compile(rf"{CHECKPOINTS_PREFIX}step-(\d+)/(\d+)/")
_NODE_PART = re.compile(rf"{_UPLOAD.pattern}{re.escape(_PARTS)}(\d+)\.json")
_REFERENCE = re.compile(r"([^/]+)/(?:([^/]+)\.json|([^/]+)/.+)")


class UploadKey(NamedTuple):
    """The step and the attempt that a key below `checkpoints/` belongs to."""

    step: int
    attempt: int


class NodePartKey(NamedTuple):
    """The step, attempt and node that a node's list of files belongs to."""

    step: int
    attempt: int
    node: int


class ReferenceKey(NamedTuple):
    """The fingerprint and the run that a key in a recipe's folder of references belongs to."""

    fingerprint: str
    run_id: str


def checked_run_id(run_id: str, *, new: bool = False) -> str:
    """Return the id if it can name a run.

    Args:
        run_id: a name in the folder of runs.
        new: also apply the rules for names that users give to new runs. They have at most 100 characters and begin
            with a letter or digit, so that no command takes them for an option or a hidden file.

    Raises:
        BucketError: the id breaks a rule.
    """
    if run_id == REFERENCE_FOLDER:
        raise BucketError(
            f"`{run_id}` cannot name a run: it is the folder that runs share", hint="choose another name"
        )
    valid = RUN_ID.fullmatch(run_id) is not None
    if new:
        valid = valid and run_id[0].isalnum() and len(run_id) <= NEW_RUN_ID_LENGTH
    if not valid:
        most = (
            f"at most {NEW_RUN_ID_LENGTH} of them, and begin with a letter or digit"
            if new
            else "at most 200 of them"
        )
        raise BucketError(
            f"`{run_id}` cannot name a run", hint=f"use letters, digits, dots, dashes and underscores, {most}"
        )
    return run_id


def attempt_key(attempt: int) -> str:
    """Return the key of an attempt's claim."""
    return f"{ATTEMPTS_PREFIX}{attempt:04d}.json"


def claimed_attempt(key: str) -> int | None:
    """Return the number of the attempt whose claim has this key, or None for another key."""
    match = _ATTEMPT.fullmatch(key)
    return int(match[1]) if match else None


def events_key(attempt: int) -> str:
    """Return the key of an attempt's events."""
    return f"{EVENTS_PREFIX}{attempt:04d}.jsonl"


def events_attempt(key: str) -> int | None:
    """Return the number of the attempt whose events have this key, or None for another key."""
    match = _EVENTS.fullmatch(key)
    return int(match[1]) if match else None


def step_prefix(step: int) -> str:
    """Return the prefix of all files of a step, from any attempt."""
    return f"{CHECKPOINTS_PREFIX}step-{step:08d}/"


def upload_prefix(step: int, attempt: int) -> str:
    """Return the prefix below which an attempt uploads the files of a step."""
    return f"{step_prefix(step)}{attempt:04d}/"


def upload_of(key: str) -> UploadKey | None:
    """Return the step and attempt that a file of a checkpoint belongs to, or None for another key."""
    match = _UPLOAD.match(key)
    return UploadKey(int(match[1]), int(match[2])) if match else None


def node_part_key(step: int, attempt: int, node: int) -> str:
    """Return the key of the list of files that a node uploaded of a step."""
    return f"{upload_prefix(step, attempt)}{_PARTS}{node:04d}.json"


def node_part_of(key: str) -> NodePartKey | None:
    """Return what a node's list of files belongs to, or None for another key."""
    match = _NODE_PART.fullmatch(key)
    return NodePartKey(int(match[1]), int(match[2]), int(match[3])) if match else None


def commit_key(step: int) -> str:
    """Return the key of the manifest of a step."""
    return f"{COMMITS_PREFIX}step-{step:08d}.json"


def committed_step(key: str) -> int | None:
    """Return the step whose manifest has this key, or None for another key."""
    match = _COMMIT.fullmatch(key)
    return int(match[1]) if match else None


def final_uri(run_uri: str) -> str:
    """Return the address of a run's exported model, without a slash at its end."""
    return f"{run_uri.rstrip('/')}/{FINAL_PREFIX.rstrip('/')}"


def run_of_final(uri: str) -> str | None:
    """Return the address of the run whose exported model has this address, or None for another address."""
    run_uri, _, folder = uri.rstrip("/").rpartition("/")
    return run_uri if folder == FINAL_PREFIX.rstrip("/") else None


def reference_uri(checkpoints: str) -> str:
    """Return the address of the references that the runs below `checkpoints` share."""
    return f"{checkpoints.rstrip('/')}/{REFERENCE_FOLDER}"


def reference_prefix(fingerprint: str, run_id: str) -> str:
    """Return the prefix, in a recipe's folder of references, of all files that a run keeps for a fingerprint."""
    return f"{fingerprint}/{run_id}/"


def reference_manifest_key(fingerprint: str, run_id: str) -> str:
    """Return the key, in a recipe's folder of references, of the manifest of what a run keeps."""
    return f"{fingerprint}/{run_id}.json"


def reference_owner(key: str) -> ReferenceKey | None:
    """Return what a key in a recipe's folder of references belongs to, or None for another key."""
    match = _REFERENCE.fullmatch(key)
    return ReferenceKey(match[1], match[2] or match[3]) if match else None
