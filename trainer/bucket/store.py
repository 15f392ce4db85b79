"""One run's prefix in an object store or folder: the only place where bytes leave or enter the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import xxhash
from obstore.exceptions import AlreadyExistsError, BaseError

from trainer.bucket.address import BucketAddress, Patience, connect, parse
from trainer.bucket.folder_store import below, clear, folder_of, link
from trainer.bucket.layout import REFERENCE_FOLDER, checked_run_id
from trainer.bucket.ranged_reads import Pieces
from trainer.bucket.store_errors import no_such_bucket, sort_fault

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 2**20
MAX_PARTS = 9_000  # S3 takes 10,000
PARTS_AT_ONCE = 8
LARGE_AT_ONCE = 2
"""Files of more than a part at once; x 8 parts x 8 MiB: 128 MiB in flight up to 70 GiB a file."""
SMALL_AT_ONCE = 16
"""Other files at once: each is held whole, so 128 MiB too; small ones wait for answers, not for bytes."""

PATIENCE = Patience()

T = TypeVar("T")
R = TypeVar("R")


def ignore_progress(_count: int) -> None:
    """Hears nothing."""


class Object(NamedTuple):
    """What a listing says of an object."""

    key: str
    size: int
    """Bytes."""


class Checked(NamedTuple):
    """What went through: counted and summed on the way."""

    size: int
    """Bytes."""
    xxh3: str
    """128 bits, hex."""


class Bucket:
    """A run's objects; keys are relative to the run. Safe to use from several threads.

    Every method raises BucketError when the store refuses us (no such bucket, no permission,
    expired credentials) and Unavailable when it, or the way to it, failed for longer than we retry.
    """

    def __init__(self, store: ObjectStore, uri: str) -> None:
        self._store = store
        self._folder = folder_of(store)
        self._pieces = Pieces(store)
        self.uri = uri

    @property
    def run_id(self) -> str:
        return self.uri.rpartition("/")[2]

    @property
    def is_folder(self) -> bool:
        """Whether it lies in a file system, where a request costs nothing."""
        return self._folder is not None

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is no such key.
        """
        with self._faults("read", key):
            return bytes(self._store.get(key).bytes())

    def get_or_none(self, key: str) -> bytes | None:
        """The whole object, or None if there is no such key."""
        try:
            return self.get(key)
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int | None:
        """Bytes of an object; None if there is none."""
        try:
            with self._faults("look at", key):
                return int(self._store.head(key)["size"])
        except FileNotFoundError:
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write the whole object, in place of what was there; readers see the old or the new one."""
        with self._faults("write", key, write=True):
            self._store.put(key, data, use_multipart=False)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object if there is none; False if there is one already, also when an earlier try
        of this same call put it there and only the answer was lost.

        The look beforehand is for stores that ignore the condition (`keeps_first`): on those, only two
        that create at the same moment both succeed, and the later bytes stay.
        """
        with suppress(FileNotFoundError), self._faults("read", key):
            self._store.head(key)
            return False
        return self._create(key, data)

    def keeps_first(self, key: str, data: bytes) -> bool:
        """Whether the store takes conditions at all: tried on an object that is there with these bytes."""
        return not self._create(key, data)

    def _create(self, key: str, data: bytes) -> bool:
        with self._faults("write", key, write=True):
            try:
                self._store.put(key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def list(self, prefix: str = "") -> list[Object]:
        """The objects below a prefix that ends at a slash, in order of their keys."""
        with self._faults("list", prefix, write=True):
            found = [
                Object(meta["path"], meta["size"])
                for page in self._store.list(prefix or None)
                for meta in page
            ]
        return sorted(found)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects; those that are not there are as good as deleted."""
        for key in keys:
            # One by one: obstore's bulk call stops at the first missing file in folders and on GCS.
            with suppress(FileNotFoundError), self._faults("delete", key):
                self._store.delete(key)

    def folders(self, prefix: str) -> tuple[str, ...]:
        """Of a folder, the prefixes two levels below one, with those that hold no object; a store has none."""
        return below(self._folder, prefix) if self._folder else ()

    def clear(self, prefix: str) -> None:
        """Remove what is left below one of `folders`; where a store is none, its own rules remove parts of uploads."""
        if self._folder:
            clear(self._folder, prefix)

    def upload(self, key: str, path: Path) -> Checked:
        """Copy a file into the bucket, in parts if it is large, and sum the bytes that were sent.

        Into a folder on the same disk it is linked and summed: it must not be written to afterwards.
        """
        size = path.stat().st_size
        summed = _Summed()
        with path.open("rb") as file:
            if self._folder and link(path, self._folder, key):
                for _ in _parts(file, PART_BYTES, summed):
                    pass
                return summed.checked
            if size <= PART_BYTES:
                self.put(key, summed.add(file.read()))
                return summed.checked
            part = max(PART_BYTES, -(-size // MAX_PARTS))
            with self._faults("write", key, write=True):
                self._store.put(
                    key,
                    _parts(file, part, summed),
                    use_multipart=True,
                    chunk_size=part,
                    max_concurrency=PARTS_AT_ONCE,
                )
        return summed.checked

    def download(self, key: str, path: Path, tell: Callable[[int], object] = ignore_progress) -> Checked:
        """Copy an object into a file, made with its folders, and sum the bytes that were written.

        `tell` hears the bytes of each piece on the thread that moves it; what it raises ends the copy.

        Raises:
            FileNotFoundError: there is no such key.
        """
        summed = _Summed()
        with _opened(path) as file:
            for piece in self.read(key):
                _write(file, summed.add(piece))
                tell(len(piece))
        return summed.checked

    def checksum(self, key: str, tell: Callable[[int], object] = ignore_progress) -> Checked:
        """Read an object as `download` does, and keep nothing."""
        summed = _Summed()
        for piece in self.read(key):
            summed.add(piece)
            tell(len(piece))
        return summed.checked

    def read(self, key: str) -> Iterator[memoryview]:
        """Its pieces in order, of which few are in memory at a time.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._faults("read", key):
            yield from self._pieces.of(key)

    @contextmanager
    def _faults(self, verb: str, key: str, *, write: bool = False) -> Iterator[None]:
        """Sort what the store raises; a missing key stays a FileNotFoundError except for writes."""
        try:
            yield
        except FileNotFoundError as error:
            if not write and not no_such_bucket(error):
                raise FileNotFoundError(f"{self.uri}/{key}") from None
            raise sort_fault(error, f"{verb} {self.uri}/{key}") from None
        except BaseError as error:
            raise sort_fault(error, f"{verb} {self.uri}/{key}") from None


class _Summed:
    """Counts and sums bytes as they pass."""

    def __init__(self) -> None:
        self._size = 0
        self._xxh3 = xxhash.xxh3_128()

    def add(self, data: T) -> T:
        self._size += len(data)  # type: ignore[arg-type]
        self._xxh3.update(data)  # type: ignore[arg-type]
        return data

    @property
    def checked(self) -> Checked:
        return Checked(self._size, self._xxh3.hexdigest())


def sum_file(path: Path) -> Checked:
    """Size and checksum of a file on this machine, read piece by piece."""
    summed = _Summed()
    with path.open("rb") as file:
        while data := file.read(PART_BYTES):
            summed.add(data)
    return summed.checked


def _opened(path: Path) -> FileIO:
    """For writing, its folders made only if they are missing: most files of a thousand find theirs."""
    try:
        return FileIO(path, "wb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(path, "wb")


def _write(file: FileIO, data: memoryview) -> None:
    """All of it: a raw file may take less than it is given."""
    while data:
        data = data[file.write(data) :]


def _parts(file: BinaryIO, size: int, summed: _Summed) -> Iterator[bytes]:
    while data := file.read(size):
        yield summed.add(data)


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """The results in the order of the items; the first failure stops what has not begun, and is raised."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also when a Ctrl-C ends the waiting
            pool.shutdown(wait=True, cancel_futures=True)
        for future in done:
            future.result()
        return [future.result() for future in futures]


def open_run(uri: str, run_id: str, *, patience: Patience = PATIENCE) -> Bucket:
    """The run's bucket, once one listing has shown that it answers.

    Args:
        uri: s3://bucket/prefix (AWS_* variables, any endpoint), gs://bucket/prefix, file:///folder
            or a folder, which is made if it is missing.
        run_id: name of the run below `uri`: letters, digits, `.`, `_`, `-`; not `reference`.
        patience: how long to retry.

    Raises:
        BucketError: an address or run id that cannot be; no such bucket; credentials missing,
            wrong or expired; no permission.
        Unavailable: nothing answers there.
    """
    place = parse(uri).child(checked_run_id(run_id))
    _names(place, patience)
    return Bucket(connect(place, patience), str(place))


def open_file(uri: str) -> tuple[Bucket, str]:
    """The folder of an object, such as a data file, once it answers, and the object's key in it.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    folder, _, key = uri.rpartition("/")
    place = parse(folder)
    _names(place, PATIENCE)
    return Bucket(connect(place, PATIENCE), str(place)), key


def list_runs(uri: str, *, patience: Patience = PATIENCE) -> list[str]:
    """The ids of the runs below `uri`, in order; none if the folder is missing.

    Raises:
        BucketError, Unavailable: as `open_run`.
    """
    place = parse(uri)
    if place.scheme == "file" and not Path(place.path).exists():
        return []
    return [name for name in _names(place, patience) if name != REFERENCE_FOLDER]


def _names(place: BucketAddress, patience: Patience) -> list[str]:
    """What lies directly below; the one call that shows whether the store answers us."""
    store = connect(place, patience, opening=True)
    try:
        return sorted(name.rpartition("/")[2] for name in store.list_with_delimiter()["common_prefixes"])
    except (BaseError, FileNotFoundError) as error:
        raise sort_fault(error, f"open {place}", opening=True) from None
