"""Objects read in order, piece by piece: large ones in ranges that are fetched at the same time, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from obstore.exceptions import GenericError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

WINDOW_BYTES = 8 * 2**20
STREAM_BYTES = 2**20
"""Measured: a fifth less CPU than pieces of 8 MiB, which are fresh memory each time."""
WINDOWS_AT_ONCE = 16
"""Over all readers of a bucket: 128 MiB in flight. An object of one window or less is held whole, so
`SMALL_AT_ONCE` of them are as much again."""


class Pieces:
    """Reads objects of one store; raises what the store raises."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._room = threading.Semaphore(WINDOWS_AT_ONCE)
        self._takes_ranges = True

    def of(self, key: str) -> Iterator[memoryview]:
        """An object in order; a small one takes a single request."""
        whole = self._store.get(key)
        size = whole.meta["size"]
        if size <= WINDOW_BYTES:
            yield memoryview(whole.bytes())
            return
        if not self._sees_ranges(key):
            for piece in whole.stream(STREAM_BYTES):
                yield memoryview(piece)
            return
        del whole  # ends that answer
        yield from self._windows(key, size)

    def _sees_ranges(self, key: str) -> bool:
        """Whether the store says that a range is one: `rclone serve s3` says 200, which obstore does not accept."""
        if self._takes_ranges:
            try:
                self._store.get_range(key, start=0, length=1)
            except GenericError as error:
                if "non-partial response" not in str(error):
                    raise
                self._takes_ranges = False
        return self._takes_ranges

    def _windows(self, key: str, size: int) -> Iterator[memoryview]:
        """Each window is a request of its own, retried on its own.

        Readers share the room: one that holds none waits for it, one that holds some takes more only
        if there is more, so none waits for another for ever.
        """
        starts = deque(range(0, size, WINDOW_BYTES))
        ahead: deque[Future[memoryview]] = deque()
        try:
            with ThreadPoolExecutor(WINDOWS_AT_ONCE) as pool:
                while starts or ahead:
                    while starts and self._room.acquire(blocking=not ahead):
                        ahead.append(pool.submit(self._window, key, starts.popleft(), size))
                    yield ahead[0].result()
                    ahead.popleft()
                    self._room.release()
        finally:
            for _ in ahead:
                self._room.release()

    def _window(self, key: str, start: int, size: int) -> memoryview:
        return memoryview(self._store.get_range(key, start=start, end=min(start + WINDOW_BYTES, size)))
