"""Helpers that move bytes between files and stores: ranged reads, parts, checksums, and parallel transfers.

All of them keep the memory in use bounded, whatever the size of a file.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import xxhash
from obstore.exceptions import GenericError

from trainer.bucket.store_errors import ignores_ranges

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 2**20
MAX_PARTS = 9_000  # S3 accepts 10,000
PARTS_AT_ONCE = 8
LARGE_AT_ONCE = 2
"""Concurrent uploads of files larger than one part. With 8 parts of 8 MiB each, 128 MiB are in flight for files up to
70 GiB."""
SMALL_AT_ONCE = 16
"""Concurrent transfers of other files. Each is in memory as a whole, so 128 MiB too. Small files wait for answers, not
for bytes."""
WINDOW_BYTES = 8 * 2**20
STREAM_BYTES = 2**20
"""Chunk size of a plain download. Measured: a fifth less CPU than with chunks of 8 MiB, which need fresh memory each
time."""
WINDOWS_AT_ONCE = 16
"""Concurrent range requests of all readers of a bucket: 128 MiB in flight. An object of at most one window is in memory
as a whole, so `SMALL_AT_ONCE` of them take as much again."""

T = TypeVar("T")
R = TypeVar("R")


def ignore_progress(_count: int) -> None:
    """A no-op progress callback."""


class Checked(NamedTuple):
    """The size and checksum of the bytes that were transferred, computed during the transfer."""

    size: int
    """Bytes."""
    xxh3: str
    """128 bits, hex."""


class Checksum:
    """Counts and hashes bytes as they pass."""

    def __init__(self) -> None:
        self._size = 0
        self._xxh3 = xxhash.xxh3_128()

    def add(self, data: T) -> T:
        """Count and hash `data`, and return it unchanged."""
        self._size += len(data)  # type: ignore[arg-type]
        self._xxh3.update(data)  # type: ignore[arg-type]
        return data

    @property
    def checked(self) -> Checked:
        return Checked(self._size, self._xxh3.hexdigest())


class RangedReader:
    """Reads the objects of one store in order; large objects come in ranges that are fetched concurrently.

    Its methods raise the store's own errors.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._free_windows = threading.Semaphore(WINDOWS_AT_ONCE)
        self._accepts_ranges = True

    def read(self, key: str) -> Iterator[memoryview]:
        """Yield the pieces of an object in order. A small object takes one request."""
        answer = self._store.get(key)
        size = answer.meta["size"]
        if size <= WINDOW_BYTES:
            yield memoryview(answer.bytes())
            return
        if not self._supports_ranges(key):
            for piece in answer.stream(STREAM_BYTES):
                yield memoryview(piece)
            return
        del answer  # closes the request
        yield from self._windows(key, size)

    def _supports_ranges(self, key: str) -> bool:
        """Return whether the store answers a range request with status 206.

        `rclone serve s3` answers with 200, which obstore does not accept.
        """
        if self._accepts_ranges:
            try:
                self._store.get_range(key, start=0, length=1)
            except GenericError as error:
                if not ignores_ranges(error):
                    raise
                self._accepts_ranges = False
        return self._accepts_ranges

    def _windows(self, key: str, size: int) -> Iterator[memoryview]:
        """Yield the windows of a large object; each window is a request with retries of its own.

        All readers share `WINDOWS_AT_ONCE` windows. A reader without a window waits for one. A reader that has one
        takes another only if one is free. So no reader can block another for ever.
        """
        starts = deque(range(0, size, WINDOW_BYTES))
        ahead: deque[Future[memoryview]] = deque()
        try:
            with ThreadPoolExecutor(WINDOWS_AT_ONCE) as pool:
                while starts or ahead:
                    while starts and self._free_windows.acquire(blocking=not ahead):
                        ahead.append(pool.submit(self._window, key, starts.popleft(), size))
                    yield ahead[0].result()
                    ahead.popleft()
                    self._free_windows.release()
        finally:
            for _ in ahead:
                self._free_windows.release()

    def _window(self, key: str, start: int, size: int) -> memoryview:
        return memoryview(self._store.get_range(key, start=start, end=min(start + WINDOW_BYTES, size)))


def checksum_file(path: Path) -> Checked:
    """Return the size and checksum of a local file; reads it in parts."""
    checksum = Checksum()
    with path.open("rb") as file:
        for _ in read_parts(file, PART_BYTES, checksum):
            pass
    return checksum.checked


def read_parts(file: BinaryIO, size: int, checksum: Checksum) -> Iterator[bytes]:
    """Yield a file in parts of `size` bytes, each added to the checksum."""
    while data := file.read(size):
        yield checksum.add(data)


def open_for_writing(path: Path) -> FileIO:
    """Open a new file; create its folders only if the first try fails, since most files share a few folders."""
    try:
        return FileIO(path, "wb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileIO(path, "wb")


def write_all(file: FileIO, data: memoryview) -> None:
    """Write all bytes: one write to a raw file may take only some of them."""
    while data:
        data = data[file.write(data) :]


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """Return the results in the order of the items.

    The first failure cancels the calls that have not started, and is raised.
    """
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also after Ctrl-C
            pool.shutdown(wait=True, cancel_futures=True)
        for future in done:
            future.result()
        return [future.result() for future in futures]
