"""Full disks: how their errors are recognised, and what users are shown."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import NoRoom, error_chain
from trainer.job import Job, Outcome
from trainer.staged import BUFFERS_FOLDER, STAGED_SUFFIX

FULL = {errno.ENOSPC, errno.EDQUOT}
SIGNS = (
    "No space left on device",  # safetensors raises an error type of its own
    "Disk quota exceeded",
)
BALLAST = "ballast"
"""A file in the work folder that reserves space. It is removed when the disk is full, so that the outcome can be
written."""
BALLAST_BYTES = 256 * 1024
HINT = "committed checkpoints are safe; free some space, give `--work` a larger disk, or choose `--staging`"


def is_full(error: BaseException) -> bool:
    """Return whether an error or one of its causes means a full disk or an exhausted quota."""
    return any(
        (isinstance(link, OSError) and link.errno in FULL) or any(sign in str(link) for sign in SIGNS)
        for link in error_chain(error)
    )


def no_room(job: Job, error: BaseException) -> Outcome | None:
    """Return the outcome of a worker whose disk is full, and free space for it by removing unfinished checkpoints.

    Returns:
        None if the error is about something else.
    """
    if not is_full(error):
        return None
    free = shutil.disk_usage(job.staging).free
    (job.work / BALLAST).unlink(missing_ok=True)
    written = _remove_unfinished(job.staging)
    message = f"no room left in {job.staging}: {free / 1e6:,.1f} MB were free"
    if written:
        message += f" after {written / 1e6:,.1f} MB of the save were written"
    return Outcome(status="no_room", message=message, hint=HINT)


def reserve_disk(work: Path) -> None:
    """Write the file that reserves space for an outcome."""
    (work / BALLAST).write_bytes(bytes(BALLAST_BYTES))


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Convert the error of a full disk.

    Raises:
        NoRoom: names the folder and its free space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free
        raise NoRoom(f"no room left in {folder}: {free / 1e6:,.1f} MB are free", hint=HINT) from error


def _remove_unfinished(staging: Path) -> int:
    """Remove the folders in staging that have no marker, and return the bytes that the save had written."""
    unfinished = [
        path
        for path in staging.iterdir()
        if path.is_dir() and not (staging / f"{path.name}{STAGED_SUFFIX}").exists()
    ]
    written = sum(
        path.stat().st_size
        for folder in unfinished
        if folder.name != BUFFERS_FOLDER  # its files are links to files of checkpoints, or wait for a save
        for path in folder.rglob("*")
        if path.is_file()
    )
    for folder in unfinished:
        shutil.rmtree(folder, ignore_errors=True)
    return written
