"""Where an attempt keeps what it stages: in memory if there is room for it, else on disk."""

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

Wanted = Literal["auto", "tmpfs", "disk"]
TMPFS = Path("/dev/shm")  # noqa: S108 (a folder of our own in it, checked to be ours)
STAGED = 3
"""Checkpoints in staging at once: one being uploaded, one waiting, one being written."""
RESERVE = 0.25
"""Share of the host's memory that staging leaves alone, for data loaders and what is offloaded."""
CHECKPOINT_PER_MODEL = 7
"""At most so many times a model's files in bfloat16: ZeRO keeps 2 + 12 bytes a parameter, the files 2."""


class Size(NamedTuple):
    """What one checkpoint takes."""

    bytes: int
    source: str
    measured: bool
    """It is a committed checkpoint's, which is also to be restored; else an upper bound."""


class Capacity(NamedTuple):
    """Bytes that may be filled."""

    disk: int
    tmpfs: int
    """Free there; 0 without one that is ours to use."""
    memory: int
    """Available on the host, less the reserve."""

    @property
    def in_memory(self) -> int:
        return max(0, min(self.tmpfs, self.memory))


class Placement(NamedTuple):
    """Where things go, and why."""

    staging: Literal["tmpfs", "disk"]
    restored: Literal["tmpfs", "disk"]
    reason: str


def place(size: Size | None, room: Capacity, wanted: Wanted, *, adapter: bool = False) -> Placement:
    """Choose, from sizes alone.

    What is restored is read once and lies on disk, unless tmpfs was asked for by name.

    Raises:
        NoRoom: a measured size fits nowhere that was allowed. A bound refuses nothing.
    """
    if size is None:
        kind: Literal["tmpfs", "disk"] = "tmpfs" if wanted == "tmpfs" else "disk"
        return Placement(kind, kind, "the size of a checkpoint is not known before the first one")
    staged, restored = STAGED * size.bytes, size.bytes * size.measured
    needs = f"{STAGED} checkpoints of {_gb(size.bytes)} ({size.source})"
    has = f"{_gb(room.in_memory)} of memory and {_gb(room.disk)} of disk may be filled"
    if wanted == "tmpfs":
        if staged + restored > room.in_memory and size.measured:
            raise _refused(needs, has, size)
        return Placement("tmpfs", "tmpfs", f"as asked for, {needs}; {has}")
    if wanted == "auto" and not adapter and staged <= room.in_memory and restored <= room.disk:
        return Placement("tmpfs", "disk", f"{needs}; {has}")
    if staged + restored > room.disk and size.measured:
        raise _refused(needs, has, size)
    why = "adapters are small, a model merged from one is not" if adapter and wanted == "auto" else has
    return Placement("disk", "disk", f"{needs}; {why}")


def _refused(needs: str, has: str, size: Size) -> NoRoom:
    restored = " and one that is restored" if size.measured else ""
    return NoRoom(
        f"no room to stage {needs}{restored}: {has}",
        hint="free some space, give `--work` a larger disk, choose another `--staging`,"
        " or a machine with more memory",
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e6:,.2f} MB"


def expected_size(bucket: Bucket, model: str | None, predicted: int | None = None) -> Size | None:
    """From the newest commit; else from the model's numbers; else a bound from its folder; None without any.

    Raises:
        BucketError, Unavailable: as in `Bucket`.
    """
    newest = next((found for found in commits(bucket) if isinstance(found, Manifest)), None)
    if newest:
        return Size(newest.size, f"as committed at step {newest.step}", measured=True)
    if predicted:
        return Size(predicted, "as predicted from the model's numbers", measured=False)
    if model and Path(model).is_dir():
        held = sum(path.stat().st_size for path in Path(model).rglob("*") if path.is_file())
        return Size(
            CHECKPOINT_PER_MODEL * held,
            f"at most, {CHECKPOINT_PER_MODEL} times the model's files",
            measured=False,
        )
    return None


class Folders:
    """An attempt's folders on disk and, if need be, on tmpfs."""

    def __init__(self, work: Path, in_memory: Path) -> None:
        self.work = work
        self._in_memory = in_memory

    def look(self, *, kept: int) -> Capacity:
        """What may be filled now, with `kept` bytes of memory left alone."""
        return Capacity(
            disk=shutil.disk_usage(self.work).free,
            tmpfs=shutil.disk_usage(self._in_memory.parents[1]).free if self._is_ours() else 0,
            memory=available_bytes() - kept,
        )

    def make(self, placement: Placement) -> Path:
        """Make `staging/` in the work folder, a link if it lies on tmpfs; the folder for what is restored."""
        staging = self.work / "staging"
        if placement.staging == "disk":
            staging.mkdir()
        else:
            if not self._is_ours():
                raise NoRoom(
                    f"there is no {self._in_memory.parents[1]} to stage in", hint="use `--staging disk`"
                )
            (self._in_memory / "staging").mkdir(parents=True)
            staging.symlink_to(self._in_memory / "staging")
        return (self._in_memory if placement.restored == "tmpfs" else self.work) / "restored"

    def _is_ours(self) -> bool:
        return is_ours(self._in_memory.parent)


@contextmanager
def folders(run_folder: Path, attempt: int, tmpfs: Path = TMPFS, *, node: int = 0) -> Iterator[Folders]:
    """This attempt's folders on this machine, its own alone; gone when it ends.

    What killed attempts have left is removed. One that lives still has its own: it is superseded, and ends by itself.
    """
    name = f"attempt-{attempt:04d}" + (f"-node{node}" if node else "")  # nodes may share a disk
    digest = hashlib.sha256(str(run_folder.absolute()).encode()).hexdigest()[:8]
    in_memory = tmpfs / f"aeolus-{os.getuid()}" / f"{run_folder.name}-{digest}-{name}"
    work = run_folder / name
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    with claimed(in_memory), claimed(work):
        work.mkdir(parents=True)
        try:
            yield Folders(work, in_memory)
        finally:
            for mine in (work, in_memory):
                shutil.rmtree(mine, ignore_errors=True)


log = logging.getLogger(__name__)
LOCK_SUFFIX = ".lock"


def is_ours(folder: Path) -> bool:
    """Whether a folder is, or could be made, one that nobody else can write to: what lies in it may be removed."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, before the folder is made; before that, remove what nobody holds beside it.

    Where there is no such place to write to, nothing is held and nothing is lost: see `Folders.look`.
    """
    if not is_ours(folder.parent):
        yield
        return
    with ExitStack() as held:
        with _alone_in(folder.parent):
            _sweep(folder.parent)
            lock = held.enter_context(_beside(folder).open("w"))
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            _beside(folder).unlink(missing_ok=True)


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Nobody else sweeps here meanwhile: a lock that is made and not yet held looks like one that is left."""
    number = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _sweep(parent: Path) -> None:
    """Remove what supervisors that were killed have left."""
    found = {path.with_name(path.name.removesuffix(LOCK_SUFFIX)) for path in parent.iterdir()}
    for folder in sorted(found):
        with suppress(OSError), _beside(folder).open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its supervisor lives
            if folder.exists():
                log.info("%s was left by a supervisor that was killed: removed", folder)
            shutil.rmtree(folder, ignore_errors=True)
            _beside(folder).unlink(missing_ok=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK_SUFFIX)
