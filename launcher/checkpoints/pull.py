"""A checkpoint or model brought to a folder here: verified file by file, resumed where it was cut off."""

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

from launcher.checkpoints.inspect import Tell
from launcher.local.signals import Signals
from trainer.bucket import Bucket
from trainer.bucket.manifest import File, Manifest
from trainer.bucket.restore import FILES_AT_ONCE, mismatch
from trainer.bucket.store import in_parallel, sum_file
from trainer.errors import UserError
from trainer.files import write_atomically

OWN_FOLDER = ".aeolus-pull"
"""In the destination while a pull is under way: which one, and the files in the making."""


class Ticket(BaseModel):
    """Which pull a destination is a part of."""

    model_config = ConfigDict(frozen=True)

    uri: str
    kind: str
    step: int
    attempt: int
    created: datetime

    @classmethod
    def of(cls, bucket: Bucket, about: Manifest) -> Ticket:
        return cls(
            uri=bucket.uri, kind=about.kind, step=about.step, attempt=about.attempt, created=about.created
        )

    def __str__(self) -> str:
        return f"the final model of {self.uri}" if self.kind == "final" else f"step {self.step} of {self.uri}"


@dataclass(frozen=True)
class Pulled:
    """What a pull came to."""

    path: Path
    manifest: Manifest
    fetched: tuple[File, ...]
    """The files that were not there already."""
    failures: tuple[str, ...]
    """One for each file that did not verify, naming it; the destination then stays a part."""
    seconds: float


def begun(dest: Path) -> Ticket | None:
    """The pull that `dest` is a part of."""
    try:
        return Ticket.model_validate_json((dest / OWN_FOLDER / "ticket.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def pull(bucket: Bucket, about: Manifest, dest: Path, tell: Tell) -> Pulled:
    """Bring a manifest's files to `dest`, but for those that are there with size and checksum already.

    Raises:
        UserError: `dest` holds other things, or a part of another pull; no room; no right to write.
    """
    began = time.monotonic()
    try:
        present = _present(bucket, about, dest)
        for file in present:
            tell(file.size)
        missing = [file for file in about.files if file not in present]
        _make_room(dest, missing)
        if missing:
            _write_ticket(dest, Ticket.of(bucket, about))
        told = in_parallel(
            lambda file: _bring(bucket, about, file, dest, tell), missing, threads=FILES_AT_ONCE
        )
        failures = tuple(sorted(filter(None, told)))
        if not failures:
            shutil.rmtree(dest / OWN_FOLDER, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write to {dest}: {error.strerror or error}") from None
    return Pulled(dest, about, tuple(missing), failures, time.monotonic() - began)


def _present(bucket: Bucket, about: Manifest, dest: Path) -> set[File]:
    """The files that need not be fetched; raises UserError if `dest` is not ours to write to."""
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is no folder", hint="name one that is empty or not there yet")
    ticket = begun(dest)
    if ticket and ticket != Ticket.of(bucket, about):
        raise UserError(
            f"{dest} holds a part of another pull: {ticket}, attempt {ticket.attempt}",
            hint="finish that one, or remove the folder",
        )
    found = {path.relative_to(dest).as_posix() for path in dest.rglob("*") if path.is_file()}
    whole = in_parallel(lambda file: _is_there(file, dest), about.files, threads=FILES_AT_ONCE)
    present = {file for file, there in zip(about.files, whole, strict=True) if there}
    finished = found == {file.path for file in present} and len(present) == len(about.files)
    if found and not ticket and not finished:
        raise UserError(f"{dest} holds other things", hint="name a folder that is empty or not there yet")
    return present


def _is_there(file: File, dest: Path) -> bool:
    path = dest / file.path
    return path.is_file() and path.stat().st_size == file.size and sum_file(path) == (file.size, file.xxh3)


def _make_room(dest: Path, missing: list[File]) -> None:
    dest.mkdir(parents=True, exist_ok=True)
    free, need = shutil.disk_usage(dest).free, sum(file.size for file in missing)
    if need > free:
        raise UserError(
            f"{dest} has {free / 2**30:.1f} GiB free, {need / 2**30:.1f} GiB are to be brought",
            hint="free some space, or name a folder on another disk",
        )


def _write_ticket(dest: Path, ticket: Ticket) -> None:
    path = dest / OWN_FOLDER / "ticket.json"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, ticket.model_dump_json())


def _bring(bucket: Bucket, about: Manifest, file: File, dest: Path, tell: Tell) -> str | None:
    """Fetch one file; it appears under its name only if it verifies, else the reason is the answer."""
    key = about.prefix + file.path
    partial = dest / OWN_FOLDER / "files" / file.path
    try:
        got = bucket.download(key, partial, tell)
    except FileNotFoundError:
        return mismatch(key, file, None)
    if reason := mismatch(key, file, got):
        partial.unlink()
        return reason
    (dest / file.path).parent.mkdir(parents=True, exist_ok=True)
    partial.replace(dest / file.path)
    return None


@contextmanager
def bar(console: Console, what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left, on a terminal; what is given hears of bytes, on any thread.

    After SIGINT or SIGTERM it raises KeyboardInterrupt, so that every transfer stops with its next piece.
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

        def tell(count: int) -> None:
            if signals.wait(0):
                raise KeyboardInterrupt
            progress.advance(task, count)

        yield tell
