"""Inspect a run's checkpoints from any machine: list what is committed, and verify its bytes."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.bucket import Bucket, Object, list_runs, open_run
from trainer.bucket.address import Patience, canonical
from trainer.bucket.byte_streams import in_parallel
from trainer.bucket.layout import CHECKPOINTS_PREFIX, FINAL_COMMIT_KEY, FINAL_PREFIX, RUN_FOLDERS
from trainer.bucket.manifest import File, Manifest, Unreadable, commits, read
from trainer.bucket.restore import FILES_AT_ONCE, mismatch
from trainer.errors import BucketError, UserError

PATIENCE = Patience(transfer_s=60.0)
"""Shorter than the trainer's: a user waits, and can repeat the command."""
OnBytes = Callable[[int], object]
"""A progress callback; it receives the number of bytes that have just been transferred."""


@dataclass(frozen=True)
class CheckpointStatus:
    """The state of a checkpoint or of the final model, from its manifest and a listing of the bucket."""

    step: int
    kind: str
    manifest: Manifest | None
    """None if the manifest cannot be read."""
    fault: str | None
    """Why it is unusable; None if it is whole."""

    @property
    def is_unknown(self) -> bool:
        """Whether only a later release can read the files."""
        return self.manifest is not None and not self.manifest.is_known

    @property
    def state(self) -> str:
        return "unknown" if self.is_unknown else "broken" if self.fault else "whole"

    def as_dict(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "step": self.step,
            "kind": self.kind,
            "attempt": manifest.attempt if manifest else None,
            "created": manifest.created.isoformat() if manifest else None,
            "files": len(manifest.files) if manifest else None,
            "bytes": manifest.size if manifest else None,
            "world_size": manifest.details.get("world_size") if manifest else None,
            "engine": manifest.details.get("engine") if manifest else None,
            "state": self.state,
            "reason": self.fault,
        }


@dataclass(frozen=True)
class Survey:
    """Everything that a run has committed, newest first, with the final model before the checkpoints."""

    statuses: tuple[CheckpointStatus, ...]
    uncommitted: tuple[Object, ...]
    """Files that no manifest names: of an upload in progress, or of a machine that was lost."""

    @property
    def steps(self) -> list[int]:
        return [status.step for status in self.statuses if status.kind == "checkpoint"]


@dataclass(frozen=True)
class VerifyResult:
    """The result of reading every byte of one checkpoint."""

    status: CheckpointStatus
    failures: tuple[str, ...]
    """One message per file that is missing or differs."""
    gone: bool = False
    """The run's own retention deleted or replaced the checkpoint during the check, so there is no verdict."""

    @property
    def state(self) -> str:
        if self.status.is_unknown:
            return "unknown"
        return "gone" if self.gone else "broken" if self.failures else "verified"


def find(uri: str, cwd: Path) -> Bucket:
    """Open the run at `<folder of runs>/<run id>`; nothing is created.

    Raises:
        BucketError: no such bucket or run (the hint has the nearest names), or `uri` is a folder of runs.
        Unavailable: the store does not answer.
    """
    address = canonical(uri, cwd)
    runs, _, run_id = address.rpartition("/")
    if runs.endswith(":/") or not run_id:
        raise BucketError(
            f"{uri} names no run", hint="the address ends with the run id: s3://bucket/runs/my-run"
        )
    names = list_runs(runs)
    if run_id not in names:
        near = difflib.get_close_matches(run_id, names, n=5, cutoff=0.4) or names[:5]
        hint = f"existing runs: {_shorten(near, len(names))}" if names else f"{runs} has no runs"
        raise BucketError(f"no run {run_id} in {runs}", hint=hint)
    folders = list_runs(address)
    if not RUN_FOLDERS & set(folders):
        others = f"if it is a folder of runs, name one of {_shorten(folders[:5], len(folders))}"
        raise BucketError(f"{address} is not a run", hint=others if folders else "the folder is empty")
    return open_run(runs, run_id, patience=PATIENCE)


def survey(bucket: Bucket) -> Survey:
    """List what is committed, and check that all files exist with the right sizes."""
    found = [read(bucket, FINAL_COMMIT_KEY), *commits(bucket)]
    sizes = {
        item.key: item.size for prefix in (CHECKPOINTS_PREFIX, FINAL_PREFIX) for item in bucket.list(prefix)
    }
    named = {
        manifest.prefix + file.path
        for manifest in found
        if isinstance(manifest, Manifest)
        for file in manifest.files
    }
    uncommitted = tuple(Object(key, size) for key, size in sorted(sizes.items()) if key not in named)
    return Survey(tuple(_status(manifest, sizes) for manifest in found if manifest), uncommitted)


def choose(found: Survey, *, step: int | None = None, final: bool = False) -> CheckpointStatus:
    """Return the final model, the checkpoint of a step, or the newest checkpoint that is whole or of a later release.

    Raises:
        UserError: it does not exist; the hint has the existing steps.
    """
    kind = "final" if final else "checkpoint"
    of_kind = [status for status in found.statuses if status.kind == kind]
    if final:
        chosen = next(iter(of_kind), None)
        missing = "the run has no final model yet"
    elif step is None:
        # Without a whole checkpoint, the newest broken one is returned: the caller reports its fault.
        chosen = next((each for each in of_kind if each.state != "broken"), next(iter(of_kind), None))
        missing = "the run has no checkpoint yet"
    else:
        chosen = next((status for status in of_kind if status.step == step), None)
        missing = f"the run has no checkpoint of step {step}"
    if chosen is None:
        raise UserError(missing, hint=f"existing steps: {', '.join(map(str, found.steps)) or 'none'}")
    return chosen


def verify(bucket: Bucket, statuses: Sequence[CheckpointStatus], on_bytes: OnBytes) -> list[VerifyResult]:
    """Read every byte of these checkpoints, write none, and compare sizes and checksums with the manifests.

    Files in the format of a later release are not read: this release cannot tell whether the manifest names them all.
    """
    failures: dict[str, list[str]] = {}
    lock = threading.Lock()

    def check(item: tuple[Manifest, File]) -> None:
        manifest, file = item
        key = manifest.prefix + file.path
        try:
            actual = bucket.checksum(key, on_bytes)
        except FileNotFoundError:
            actual = None
        if reason := mismatch(key, file, actual):
            with lock:
                failures.setdefault(manifest.key, []).append(reason)

    items = [
        (status.manifest, file)
        for status in statuses
        if status.manifest and not status.is_unknown
        for file in status.manifest.files
    ]
    in_parallel(check, items, threads=FILES_AT_ONCE)
    return [_result(bucket, status, failures) for status in statuses]


def _status(manifest: Manifest | Unreadable, sizes: dict[str, int]) -> CheckpointStatus:
    if isinstance(manifest, Unreadable):
        kind = "final" if manifest.reason.startswith(FINAL_COMMIT_KEY) else "checkpoint"
        return CheckpointStatus(manifest.step, kind, None, manifest.reason)
    return CheckpointStatus(manifest.step, manifest.kind, manifest, manifest.fault(sizes))


def _result(bucket: Bucket, status: CheckpointStatus, failures: dict[str, list[str]]) -> VerifyResult:
    if status.manifest is None or status.is_unknown:
        return VerifyResult(status, (status.fault or "the manifest cannot be read",))
    failed = sorted(failures.get(status.manifest.key, []))
    if not status.manifest.files:
        failed = [status.fault or "the manifest names no files"]
    # The run's retention may have deleted the checkpoint while it was read; then the failures mean nothing.
    gone = bool(failed) and read(bucket, status.manifest.key) != status.manifest
    return VerifyResult(status, tuple(failed), gone)


def _shorten(names: Sequence[str], total: int) -> str:
    return ", ".join(names) + (f" and {total - len(names)} more" if total > len(names) else "")
