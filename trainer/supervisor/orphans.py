"""Folders whose supervisor is gone: on tmpfs they would hold memory until the machine is shut down, on disk room.

Each supervisor holds a lock beside its folder for as long as it lives, however it ends, so a folder whose lock can
be had belongs to nobody. One that is held is left alone, also by a newer attempt at the same run on this machine: its
supervisor will learn that it is superseded, and cleans up itself.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
