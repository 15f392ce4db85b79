"""The attempt's folders on this machine, and the choice between memory and disk for staged checkpoints."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.bucket import Bucket
from trainer.bucket.manifest import Manifest, commits
from trainer.errors import NoRoom
from trainer.hardware import available_bytes

log = logging.getLogger(__name__)
StagingChoice = Literal["auto", "tmpfs", "disk"]
TMPFS = Path("/dev/shm")  # noqa: S108 (we use a folder of our own in it, and check that we own it)
STAGED_CHECKPOINTS = 3
"""Buffers in the staging folder, see `trainer.memory.usage.STAGED`."""
MEMORY_RESERVE = 0.25
"""Share of the host's memory that staging leaves free, for data loaders and offloaded tensors."""
CHECKPOINT_PER_MODEL = 6
"""Upper bound of a checkpoint's size over the size of the model's bfloat16 files. A checkpoint has 12 bytes for each
parameter (float32 masters and AdamW's two moments), and the files have 2."""
LOCK_SUFFIX = ".lock"


class Size(NamedTuple):
    """The size of one checkpoint."""

    bytes: int
    source: str
    measured: bool
    """True: the size of a committed checkpoint, which this attempt also restores. False: an upper bound."""


class Capacity(NamedTuple):
    """The number of bytes that the attempt may fill."""

    disk: int
    tmpfs: int
    """Free bytes on tmpfs. 0 if there is no tmpfs folder that we own."""
    memory: int
    """Available memory of the host without the reserve."""

    @property
    def in_memory(self) -> int:
        return max(0, min(self.tmpfs, self.memory))


class Placement(NamedTuple):
    """Where staged and restored checkpoints are stored, and the reason."""

    staging: Literal["tmpfs", "disk"]
    restored: Literal["tmpfs", "disk"]
    reason: str


def choose_placement(
    size: Size | None, capacity: Capacity, wanted: StagingChoice, *, adapter: bool = False
) -> Placement:
    """Choose from sizes alone where checkpoints are stored.

    A restored checkpoint is read once, so it is stored on disk unless `wanted` is tmpfs.

    Raises:
        NoRoom: a measured size fits in no allowed place. An upper bound never causes this error.
    """
    if size is None:
        kind: Literal["tmpfs", "disk"] = "tmpfs" if wanted == "tmpfs" else "disk"
        return Placement(kind, kind, "the size of a checkpoint is unknown until the first one is saved")
    staged, restored = STAGED_CHECKPOINTS * size.bytes, size.bytes * size.measured
    needs = f"{STAGED_CHECKPOINTS} checkpoints of {_gb(size.bytes)} ({size.source})"
    available = f"{_gb(capacity.in_memory)} of memory and {_gb(capacity.disk)} of disk are available"
    if wanted == "tmpfs":
        if staged + restored > capacity.in_memory and size.measured:
            raise _no_room(needs, available, size)
        return Placement("tmpfs", "tmpfs", f"requested by --staging; {needs}; {available}")
    if wanted == "auto" and not adapter and staged <= capacity.in_memory and restored <= capacity.disk:
        return Placement("tmpfs", "disk", f"{needs}; {available}")
    if staged + restored > capacity.disk and size.measured:
        raise _no_room(needs, available, size)
    if adapter and wanted == "auto":
        reason = "the checkpoints of an adapter are small, but a model that is merged from it is not"
    else:
        reason = available
    return Placement("disk", "disk", f"{needs}; {reason}")


def expected_size(bucket: Bucket, model: str | None, predicted: int | None = None) -> Size | None:
    """Return the expected size of a checkpoint. None if nothing is known.

    The sources are the newest commit, the predicted size, and the size of the model's folder, in this order.

    Raises:
        BucketError, Unavailable: as in `Bucket`.
    """
    newest = next((found for found in commits(bucket) if isinstance(found, Manifest)), None)
    if newest:
        return Size(newest.size, f"as committed at step {newest.step}", measured=True)
    if predicted:
        return Size(predicted, "as predicted from the model's architecture", measured=False)
    if model and Path(model).is_dir():
        model_bytes = sum(path.stat().st_size for path in Path(model).rglob("*") if path.is_file())
        return Size(
            CHECKPOINT_PER_MODEL * model_bytes,
            f"at most {CHECKPOINT_PER_MODEL} times the model's files",
            measured=False,
        )
    return None


class AttemptFolders:
    """An attempt's folder on disk and, if it is needed, its folder on tmpfs."""

    def __init__(self, work: Path, in_memory: Path) -> None:
        self.work = work
        self._in_memory = in_memory

    def measure_capacity(self, *, reserved: int) -> Capacity:
        """Measure what may be filled now, without `reserved` bytes of memory."""
        return Capacity(
            disk=shutil.disk_usage(self.work).free,
            tmpfs=shutil.disk_usage(self._in_memory.parents[1]).free if self._has_tmpfs() else 0,
            memory=available_bytes() - reserved,
        )

    def create(self, placement: Placement) -> Path:
        """Create `staging/` in the work folder and return the folder for the restored checkpoint.

        If the placement is tmpfs, `staging/` is a link to a folder there.
        """
        staging = self.work / "staging"
        if placement.staging == "disk":
            staging.mkdir()
        else:
            if not self._has_tmpfs():
                raise NoRoom(
                    f"cannot stage in memory: {self._in_memory.parents[1]} does not exist or is not writable",
                    hint="use `--staging disk`",
                )
            (self._in_memory / "staging").mkdir(parents=True)
            staging.symlink_to(self._in_memory / "staging")
        return (self._in_memory if placement.restored == "tmpfs" else self.work) / "restored"

    def _has_tmpfs(self) -> bool:
        return make_private(self._in_memory.parent)


@contextmanager
def attempt_folders(
    run_folder: Path, attempt: int, tmpfs: Path = TMPFS, *, node: int = 0
) -> Iterator[AttemptFolders]:
    """Create this attempt's folders on this machine, and remove them when the attempt ends.

    Folders that killed attempts have left behind are removed first. An older attempt that is still running keeps its
    own folders. It is superseded, so it will end by itself.
    """
    name = f"attempt-{attempt:04d}" + (f"-node{node}" if node else "")  # nodes may share a disk
    digest = hashlib.sha256(str(run_folder.absolute()).encode()).hexdigest()[:8]
    in_memory = tmpfs / f"aeolus-{os.getuid()}" / f"{run_folder.name}-{digest}-{name}"
    work = run_folder / name
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(in_memory), folder_lock(work):
        work.mkdir(parents=True)
        try:
            yield AttemptFolders(work, in_memory)
        finally:
            for folder in (work, in_memory):
                shutil.rmtree(folder, ignore_errors=True)


def make_private(folder: Path) -> bool:
    """Create a folder if it is missing. Return whether we own it, so that its contents may be removed.

    A link, a folder of another user, and a place that cannot be written to all return False.
    """
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is about to be created, after removing the unlocked folders beside it.

    If the parent folder is not ours, no lock is taken and nothing is removed. `AttemptFolders` then uses no tmpfs.
    """
    if not make_private(folder.parent):
        yield
        return
    with ExitStack() as stack:
        with _exclusive_access(folder.parent):
            _remove_abandoned(folder.parent)
            lock = stack.enter_context(_lock_path(folder).open("w"))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            _lock_path(folder).unlink(missing_ok=True)


@contextmanager
def _exclusive_access(parent: Path) -> Iterator[None]:
    """Keep other supervisors from removing abandoned folders in `parent` meanwhile.

    A lock file that was just created and is not locked yet would look abandoned to them.
    """
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders that killed supervisors have left behind."""
    found = {path.with_name(path.name.removesuffix(LOCK_SUFFIX)) for path in parent.iterdir()}
    for folder in sorted(found):
        with suppress(OSError), _lock_path(folder).open("a") as lock:
            # Raises BlockingIOError while the folder's supervisor is running.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                log.info("removed %s, which a killed supervisor had left behind", folder)
            shutil.rmtree(folder, ignore_errors=True)
            _lock_path(folder).unlink(missing_ok=True)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK_SUFFIX)


def _no_room(needs: str, available: str, size: Size) -> NoRoom:
    restored = " and one that is restored" if size.measured else ""
    return NoRoom(
        f"not enough space to stage {needs}{restored}: {available}",
        hint="free some space, give `--work` a larger disk, choose another `--staging`,"
        " or use a machine with more memory",
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"
