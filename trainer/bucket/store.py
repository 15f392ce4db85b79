"""One run's prefix in an object store or folder: the only module that transfers a run's data."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from trainer.bucket.address import BucketAddress, Patience, connect, parse
from trainer.bucket.byte_streams import (
    MAX_PARTS,
    PART_BYTES,
    PARTS_AT_ONCE,
    Checked,
    Checksum,
    RangedReader,
    checksum_file,
    ignore_progress,
    open_for_writing,
    read_parts,
    write_all,
)
from trainer.bucket.layout import REFERENCE_FOLDER, checked_run_id
from trainer.bucket.store_errors import no_such_bucket, sort_fault

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PATIENCE = Patience()
PLAIN_KEY = re.compile(r"[A-Za-z0-9._/-]+")
"""Keys that are file paths without any change. obstore escapes other characters in folders."""


class Object(NamedTuple):
    """An object as a listing shows it."""

    key: str
    size: int
    """Bytes."""


class Bucket:
    """A run's objects, with keys relative to the run. Thread-safe.

    Every method raises BucketError if the store refuses the request (no such bucket, no permission, expired
    credentials), and Unavailable if the store or the network failed for longer than the retries last.
    """

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self._store = store
        self._folder = Path(store.prefix) if isinstance(store, LocalStore) and store.prefix else None
        self._reader = RangedReader(store)
        self.uri = uri

    @property
    def run_id(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        """Whether the bucket is a folder, where requests cost nothing."""
        return self._folder is not None

    def get(self, key: str) -> bytes:
        """Return the whole object.

        Raises:
            FileNotFoundError: there is no such key.
        """
        with self._faults("read", key):
            return bytes(self._store.get(key).bytes())

    def get_or_none(self, key: str) -> bytes | None:
        """Return the whole object, or None if there is no such key."""
        try:
            return self.get(key)
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if there is no such key."""
        try:
            with self._faults("look at", key):
                return int(self._store.head(key)["size"])
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write the whole object and replace any old one. Readers see either the old or the new object."""
        with self._faults("write", key, write=True):
            self._store.put(key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object if there is none.

        Returns:
            False if there is an object already. That includes one that an earlier try of this call wrote before its
            answer was lost.

        Some stores ignore the condition of a conditional write (see `keeps_first`). For them this method checks for
        the object first. On such a store, two calls at the same moment can both succeed, and the later bytes stay.
        """
        with suppress(FileNotFoundError), self._faults("read", key):
            self._store.head(key)
            return False
        return self._create(key, data)

    def keeps_first(self, key: str, data: bytes) -> bool:
        """Return whether the store supports conditional writes. Tries one on an object that has these bytes."""
        return not self._create(key, data)

    def _create(self, key: str, data: bytes) -> bool:
        with self._faults("write", key, write=True):
            try:
                self._store.put(key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def list(self, prefix: str = "") -> list[Object]:
        """Return the objects below a prefix that ends with a slash, sorted by key."""
        with self._faults("list", prefix, write=True):
            found = [
                Object(meta["path"], meta["size"])
                for page in self._store.list(prefix or None)
                for meta in page
            ]
        return sorted(found)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects. Keys that do not exist are skipped."""
        for key in keys:
            # One by one: obstore's bulk call stops at the first missing file in folders and on GCS.
            with suppress(FileNotFoundError), self._faults("delete", key):
                self._store.delete(key)

    def folders(self, prefix: str) -> tuple[str, ...]:
        """Return the prefixes two levels below `prefix`, sorted, if the bucket is a folder; empty folders count.

        An object store has no folders, so the result is empty.
        """
        if self._folder is None or not (self._folder / prefix).is_dir():
            return ()
        found = (path for path in (self._folder / prefix).glob("*/*") if path.is_dir())
        return tuple(sorted(f"{path.relative_to(self._folder).as_posix()}/" for path in found))

    def clear(self, prefix: str) -> None:
        """Remove one of `folders` with files that no listing shows, such as partial files of a killed process.

        Does nothing in an object store, whose own lifecycle rules remove unfinished uploads.
        """
        if self._folder:
            shutil.rmtree(self._folder / prefix, ignore_errors=True)
            with suppress(OSError):  # the parent has other folders
                (self._folder / prefix).parent.rmdir()

    def upload(self, key: str, path: Path) -> Checked:
        """Copy a file into the bucket, in parts if it is large, and return the checksum of the bytes sent.

        In a folder on the same disk the file gets a hard link instead, so it must not be changed afterwards.
        """
        size = path.stat().st_size
        if self._folder and _link(path, self._folder, key):
            return checksum_file(path)
        checksum = Checksum()
        with path.open("rb") as file:
            if size <= PART_BYTES:
                self.put(key, checksum.add(file.read()))
                return checksum.checked
            part = max(PART_BYTES, -(-size // MAX_PARTS))
            with self._faults("write", key, write=True):
                self._store.put(
                    key,
                    read_parts(file, part, checksum),
                    use_multipart=True,
                    chunk_size=part,
                    max_concurrency=PARTS_AT_ONCE,
                )
        return checksum.checked

    def download(self, key: str, path: Path, progress: Callable[[int], object] = ignore_progress) -> Checked:
        """Copy an object into a new file, create its folders, and return the checksum of the bytes written.

        `progress` is called with the bytes of each piece, on the thread that copies it. An exception from it ends the
        copy.

        Raises:
            FileNotFoundError: there is no such key.
        """
        checksum = Checksum()
        with open_for_writing(path) as file:
            for piece in self.read(key):
                write_all(file, checksum.add(piece))
                progress(len(piece))
        return checksum.checked

    def checksum(self, key: str, progress: Callable[[int], object] = ignore_progress) -> Checked:
        """Read an object like `download`, but store nothing."""
        checksum = Checksum()
        for piece in self.read(key):
            checksum.add(piece)
            progress(len(piece))
        return checksum.checked

    def read(self, key: str) -> Iterator[memoryview]:
        """Yield the pieces of an object in order. Only a few pieces are in memory at a time.

        Raises:
            FileNotFoundError: there is no such key.
        """
        with self._faults("read", key):
            yield from self._reader.read(key)

    @contextmanager
    def _faults(self, verb: str, key: str, *, write: bool = False) -> Iterator[None]:
        """Convert the store's errors. A missing key stays a FileNotFoundError, except in writes and listings."""
        try:
            yield
        except FileNotFoundError as error:
            if not write and not no_such_bucket(error):
                raise FileNotFoundError(f"{self.uri}/{key}") from None
            raise sort_fault(error, f"{verb} {self.uri}/{key}") from None
        except BaseError as error:
            raise sort_fault(error, f"{verb} {self.uri}/{key}") from None


def open_run(uri: str, run_id: str, *, patience: Patience = PATIENCE) -> Bucket:
    """Open the run's bucket and check with one listing that the store answers.

    Args:
        uri: s3://bucket/prefix (AWS_* variables, any endpoint), gs://bucket/prefix, file:///folder
            or a folder, which is created if it is missing.
        run_id: name of the run below `uri`; `checked_run_id` has the rule.
        patience: how long to retry.

    Raises:
        BucketError: the address or run id is invalid; no such bucket; credentials missing, wrong or expired; no
            permission.
        Unavailable: the store does not answer.
    """
    place = parse(uri).child(checked_run_id(run_id))
    _subfolders(place, patience)
    return Bucket(connect(place, patience), str(place))


def open_file(uri: str) -> tuple[Bucket, str]:
    """Open the folder of an object, such as a data file, and return it with the object's key in it.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    folder, _, key = uri.rpartition("/")
    place = parse(folder)
    _subfolders(place, PATIENCE)
    return Bucket(connect(place, PATIENCE), str(place)), key


def list_runs(uri: str, *, patience: Patience = PATIENCE) -> list[str]:
    """Return the sorted ids of the runs below `uri`; empty if the folder is missing.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    place = parse(uri)
    if place.scheme == "file" and not Path(place.path).exists():
        return []
    return [name for name in _subfolders(place, patience) if name != REFERENCE_FOLDER]


def _subfolders(place: BucketAddress, patience: Patience) -> list[str]:
    """Return the names of the folders directly below an address.

    This is the first request to a store, so it shows whether the store answers.
    """
    store = connect(place, patience, opening=True)
    try:
        return sorted(name.rpartition("/")[2] for name in store.list_with_delimiter()["common_prefixes"])
    except (BaseError, FileNotFoundError) as error:
        raise sort_fault(error, f"open {place}", opening=True) from None


def _link(path: Path, folder: Path, key: str) -> bool:
    """Create a hard link to `path` at `key` below `folder`.

    Both names share one file. This is safe, because files of a bucket are only replaced or removed, and a staged file is
    not written to again while it has another name (`trainer.worker.checkpoint.buffers`).

    Returns:
        False if the file must be copied instead: another file system, a file system without links, a key that is
        taken or is no plain path, or a symbolic link (a link to it would point to nothing once staging is removed).
    """
    if not PLAIN_KEY.fullmatch(key) or path.is_symlink():
        return False
    target = folder / key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, target)
    except OSError:  # the copy that follows reports a real fault
        return False
    return True
