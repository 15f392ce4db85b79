"""Pull a checkpoint or final model into a local folder: verified file by file, and resumable after an interruption."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from launcher.checkpoints.inspect import OnBytes
from launcher.terminal import Signals
from trainer.bucket import Bucket
from trainer.bucket.byte_streams import checksum_file, in_parallel
from trainer.bucket.manifest import File, Manifest
from trainer.bucket.restore import FILES_AT_ONCE, mismatch
from trainer.errors import UserError
from trainer.files import write_atomically

WORK_FOLDER = ".aeolus-pull"
"""In the destination during a pull: the ticket, and the files that are being downloaded."""


class Ticket(BaseModel):
    """Identifies the pull that a destination folder is part of."""

    model_config = ConfigDict(frozen=True)

    uri: str
    kind: str
    step: int
    attempt: int
    created: datetime

    @classmethod
    def of(cls, bucket: Bucket, manifest: Manifest) -> Ticket:
        return cls(
            uri=bucket.uri,
            kind=manifest.kind,
            step=manifest.step,
            attempt=manifest.attempt,
            created=manifest.created,
        )

    def __str__(self) -> str:
        return f"the final model of {self.uri}" if self.kind == "final" else f"step {self.step} of {self.uri}"


@dataclass(frozen=True)
class Pulled:
    """The result of a pull."""

    path: Path
    manifest: Manifest
    fetched: tuple[File, ...]
    """The files that were downloaded; the others existed already."""
    failures: tuple[str, ...]
    """One message per file that did not verify; the destination is then incomplete."""
    seconds: float


def read_ticket(dest: Path) -> Ticket | None:
    """Return the ticket of an unfinished pull into `dest`; None if there is none."""
    try:
        return Ticket.model_validate_json((dest / WORK_FOLDER / "ticket.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def pull(bucket: Bucket, manifest: Manifest, dest: Path, on_bytes: OnBytes) -> Pulled:
    """Download a manifest's files into `dest`, except those that already exist with the right size and checksum.

    Raises:
        UserError: `dest` holds other files or another unfinished pull, the disk is full, or `dest` is not writable.
    """
    started = time.monotonic()
    try:
        present = _present_files(bucket, manifest, dest)
        for file in present:
            on_bytes(file.size)
        missing = [file for file in manifest.files if file not in present]
        _check_space(dest, missing)
        if missing:
            _write_ticket(dest, Ticket.of(bucket, manifest))
        results = in_parallel(
            lambda file: _fetch(bucket, manifest, file, dest, on_bytes), missing, threads=FILES_AT_ONCE
        )
        failures = tuple(sorted(filter(None, results)))
        if not failures:
            shutil.rmtree(dest / WORK_FOLDER, ignore_errors=True)
    except OSError as error:
        hint = "check the disk and your permissions, or pull into another folder"
        raise UserError(f"cannot write to {dest}: {error.strerror or error}", hint=hint) from None
    return Pulled(dest, manifest, tuple(missing), failures, time.monotonic() - started)


@contextmanager
def bar(console: Console, what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, with rate and remaining time; yield its thread-safe callback for bytes.

    After SIGINT or SIGTERM the callback raises KeyboardInterrupt, so that every transfer stops at its next piece.
    """
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with Signals() as signals, progress:
        task = progress.add_task(what, total=total_bytes)

        def on_bytes(count: int) -> None:
            if signals.wait(0):
                raise KeyboardInterrupt
            progress.advance(task, count)

        yield on_bytes


def _present_files(bucket: Bucket, manifest: Manifest, dest: Path) -> set[File]:
    """Return the files that need no download; raises UserError if `dest` holds anything else."""
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is not a folder", hint="name an empty or new folder")
    ticket = read_ticket(dest)
    if ticket and ticket != Ticket.of(bucket, manifest):
        raise UserError(
            f"{dest} holds an unfinished pull of something else: {ticket}, attempt {ticket.attempt}",
            hint="finish that pull, or delete the folder",
        )
    found = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    checked = in_parallel(lambda file: _is_present(file, dest), manifest.files, threads=FILES_AT_ONCE)
    present = {file for file, is_present in zip(manifest.files, checked, strict=True) if is_present}
    # Without a ticket, a folder with files is only accepted if it is exactly the finished pull.
    finished = found == {file.path for file in present} and len(present) == len(manifest.files)
    if found and not ticket and not finished:
        raise UserError(f"{dest} holds other files", hint="name an empty or new folder")
    return present


def _is_present(file: File, dest: Path) -> bool:
    path = dest / file.path
    return (
        path.is_file() and path.stat().st_size == file.size and checksum_file(path) == (file.size, file.xxh3)
    )


def _check_space(dest: Path, missing: list[File]) -> None:
    dest.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(dest).free, sum(file.size for file in missing)
    if need > free:
        raise UserError(
            f"{dest} has {free / 2**30:.1f} GiB free, and the download needs {need / 2**30:.1f} GiB",
            hint="free some space, or name a folder on another disk",
        )


def _write_ticket(dest: Path, ticket: Ticket) -> None:
    path = dest / WORK_FOLDER / "ticket.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, ticket.model_dump_json())


def _fetch(bucket: Bucket, manifest: Manifest, file: File, dest: Path, on_bytes: OnBytes) -> str | None:
    """Download one file and move it to its place if it verifies; return why it does not, else None."""
    key = manifest.prefix + file.path
    partial = dest / WORK_FOLDER / "files" / file.path
    try:
        actual = bucket.download(key, partial, on_bytes)
    except FileNotFoundError:
        return mismatch(key, file, None)
    if reason := mismatch(key, file, actual):
        partial.unlink()
        return reason
    (dest / file.path).parent.mkdir(parents=True, exist_ok=True)
    partial.replace(dest / file.path)
    return None
