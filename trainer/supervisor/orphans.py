"""Folders on tmpfs whose supervisor is gone: they would hold memory until the machine is shut down.

Each supervisor holds a lock beside its folder for as long as it lives, however it ends, so a folder whose lock can
be had belongs to nobody.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    """Hold a folder's lock, made or not yet made; before that, remove its siblings that nobody holds.

    Where there is no such place to write to, nothing is held and nothing is lost: see `Folders.look`.
    """
    if not is_ours(folder.parent):
        yield
        return
    _sweep(folder)
    with _beside(folder).open("w") as lock:
        with suppress(BlockingIOError):  # two supervisors of one run on one machine: the first holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            _beside(folder).unlink(missing_ok=True)


def _sweep(mine: Path) -> None:
    """Remove what supervisors that were killed have left of other runs."""
    for lock in mine.parent.glob(f"*{LOCK_SUFFIX}"):
        folder = lock.with_name(lock.name.removesuffix(LOCK_SUFFIX))
        if folder == mine:
            continue
        with suppress(OSError), lock.open("r+") as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its supervisor lives
            if folder.exists():
                log.info("%s was left by a supervisor that was killed: removed", folder)
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK_SUFFIX)
