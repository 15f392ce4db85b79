"""A run's checkpoints, looked at and cared for from anywhere: which are there, whether they verify."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.bucket import Bucket, Object, list_runs, open_run
from trainer.bucket.address import Patience, canonical
from trainer.bucket.attempts import Attempt
from trainer.bucket.layout import (
    ATTEMPTS_PREFIX,
    CHECKPOINTS_PREFIX,
    FINAL_COMMIT_KEY,
    FINAL_PREFIX,
    RUN_FOLDERS,
)
from trainer.bucket.manifest import (
    File,
    Manifest,
    Unreadable,
    commits,
    read,
)
from trainer.bucket.restore import FILES_AT_ONCE, mismatch
from trainer.bucket.retention import Outdated, outdated
from trainer.bucket.retention import prune as prune_as
from trainer.bucket.store import in_parallel
from trainer.errors import BucketError, UserError

PATIENCE = Patience(transfer_s=60.0)
"""Somebody waits, and what is left undone the same command does later."""
Tell = Callable[[int], object]


@dataclass(frozen=True)
class CheckpointStatus:
    """A checkpoint or the final model, as far as listings tell."""

    step: int
    kind: str
    manifest: Manifest | None
    """None if it cannot be read."""
    fault: str | None
    """Why it must not be believed."""

    def as_dict(self) -> dict[str, Any]:
        about = self.manifest
        return {
            "step": self.step,
            "kind": self.kind,
            "attempt": about.attempt if about else None,
            "created": about.created.isoformat() if about else None,
            "files": len(about.files) if about else None,
            "bytes": about.size if about else None,
            "world_size": about.details.get("world_size") if about else None,
            "engine": about.details.get("engine") if about else None,
            "state": "broken" if self.fault else "whole",
            "reason": self.fault,
        }


@dataclass(frozen=True)
class Survey:
    """All that a run has in its bucket, newest first; the final model before the checkpoints."""

    standings: tuple[CheckpointStatus, ...]
    uncommitted: tuple[Object, ...]
    """Files that no manifest names: an upload on its way, or what a lost machine left."""

    @property
    def steps(self) -> list[int]:
        return [standing.step for standing in self.standings if standing.kind == "checkpoint"]


@dataclass(frozen=True)
class VerifyResult:
    """What became of one checkpoint when every byte of it was read."""

    standing: CheckpointStatus
    failures: tuple[str, ...]
    """One for each file that is missing or differs, naming it."""
    gone: bool = False
    """Deleted or replaced while it was read, by the run's own retention: neither good nor bad."""

    @property
    def state(self) -> str:
        return "gone" if self.gone else "broken" if self.failures else "verified"


def find(uri: str, cwd: Path) -> Bucket:
    """The run at `<folder of runs>/<run id>`; nothing is made where there is none.

    Raises:
        BucketError: no such bucket or run, with the nearest names; or a folder of runs and no run.
        Unavailable: nothing answers there.
    """
    address = canonical(uri, cwd)
    runs, _, run_id = address.rpartition("/")
    if runs.endswith(":/") or not run_id:
        raise BucketError(f"{uri} names no run", hint="it ends with the run's id: s3://bucket/runs/my-run")
    names = list_runs(runs)
    if run_id not in names:
        near = difflib.get_close_matches(run_id, names, n=5, cutoff=0.4) or names[:5]
        hint = f"runs in there: {_some(near, len(names))}" if names else "no runs are in there"
        raise BucketError(f"no run {run_id} in {runs}", hint=hint)
    below = list_runs(address)
    if not RUN_FOLDERS & set(below):
        others = f"is it a folder of runs? name one of {_some(below[:5], len(below))}"
        raise BucketError(f"{address} holds no run", hint=others if below else "the folder is empty")
    return open_run(runs, run_id, patience=PATIENCE)


def survey(bucket: Bucket) -> Survey:
    """What is committed, and whether its files are there with their sizes."""
    found = [read(bucket, FINAL_COMMIT_KEY), *commits(bucket)]
    there = {
        item.key: item.size for prefix in (CHECKPOINTS_PREFIX, FINAL_PREFIX) for item in bucket.list(prefix)
    }
    named = {
        about.prefix + file.path for about in found if isinstance(about, Manifest) for file in about.files
    }
    leftovers = tuple(Object(key, size) for key, size in sorted(there.items()) if key not in named)
    return Survey(tuple(_standing(about, there) for about in found if about), leftovers)


def choose(found: Survey, *, step: int | None = None, final: bool = False) -> CheckpointStatus:
    """The final model, the checkpoint of a step, or the newest whole one; raises UserError with what there is."""
    kind = "final" if final else "checkpoint"
    of_kind = [standing for standing in found.standings if standing.kind == kind]
    steps = ", ".join(map(str, found.steps)) or "none"
    if final:
        chosen = next(iter(of_kind), None)
        missing = "the run has no final model yet"
    elif step is None:
        chosen = next((standing for standing in of_kind if standing.fault is None), next(iter(of_kind), None))
        missing = "the run has no checkpoint yet"
    else:
        chosen = next((standing for standing in of_kind if standing.step == step), None)
        missing = f"the run has no checkpoint of step {step}"
    if chosen is None:
        raise UserError(missing, hint=f"steps there: {steps}")
    return chosen


def verify(bucket: Bucket, standings: Sequence[CheckpointStatus], tell: Tell) -> list[VerifyResult]:
    """Read every byte of these checkpoints and keep none; `tell` hears the bytes as they come."""
    failures: dict[str, list[str]] = {}
    adding = threading.Lock()

    def check(item: tuple[Manifest, File]) -> None:
        manifest, file = item
        key = manifest.prefix + file.path
        try:
            got = bucket.checksum(key, tell)
        except FileNotFoundError:
            got = None
        if reason := mismatch(key, file, got):
            with adding:
                failures.setdefault(manifest.key, []).append(reason)

    items = [(about.manifest, file) for about in standings if about.manifest for file in about.manifest.files]
    in_parallel(check, items, threads=FILES_AT_ONCE)
    return [_verdict(bucket, standing, failures) for standing in standings]


def newest_attempt(bucket: Bucket) -> Attempt:
    """Whoever has the run, to ask whether somebody else has it by now."""
    names = [
        item.key.removeprefix(ATTEMPTS_PREFIX).removesuffix(".json") for item in bucket.list(ATTEMPTS_PREFIX)
    ]
    return Attempt(bucket, max((int(name) for name in names if name.isdecimal()), default=0))


def prunable(bucket: Bucket, attempt: Attempt, keep: int) -> Outdated:
    """What `prune` would delete.

    Safe beside an attempt at work: it is what the newest attempt's own retention deletes. Checkpoints
    below the newest `keep` whole ones, manifests first; and files that no manifest names, if they
    are below the newest commit and of earlier attempts, which can no longer commit, or below the
    newest attempt's own newest commit, for it uploads only what is above.
    """
    return outdated(bucket, attempt.number, keep)


def prune(bucket: Bucket, attempt: Attempt, keep: int) -> list[int]:
    """Delete what `prunable` told; the steps. Raises Superseded if another attempt has claimed the run since."""
    return prune_as(bucket, attempt, keep)


def _standing(about: Manifest | Unreadable, there: dict[str, int]) -> CheckpointStatus:
    if isinstance(about, Unreadable):
        kind = "final" if about.reason.startswith(FINAL_COMMIT_KEY) else "checkpoint"
        return CheckpointStatus(about.step, kind, None, about.reason)
    return CheckpointStatus(about.step, about.kind, about, about.fault(there))


def _verdict(bucket: Bucket, standing: CheckpointStatus, failures: dict[str, list[str]]) -> VerifyResult:
    if standing.manifest is None:
        return VerifyResult(standing, (standing.fault or "unreadable",))
    failed = sorted(failures.get(standing.manifest.key, []))
    if not standing.manifest.files:
        failed = [standing.fault or "no files"]
    gone = bool(failed) and read(bucket, standing.manifest.key) != standing.manifest
    return VerifyResult(standing, tuple(failed), gone)


def _some(names: Sequence[str], total: int) -> str:
    return ", ".join(names) + (f" and {total - len(names)} more" if total > len(names) else "")
