"""Large objects are read in order and in bounded memory, also from servers without range requests."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from trainer.bucket.byte_streams import WINDOW_BYTES, WINDOWS_AT_ONCE, RangedReader, in_parallel

SIZE = 3 * WINDOW_BYTES + 7


class Watched:
    """A store that counts the ranges in flight. Ranges from `fails_at` on fail."""

    def __init__(self, data: bytes, *, fails_at: int | None = None) -> None:
        self._store = MemoryStore()
        self._store.put("key", data)
        self._fails_at = fails_at
        self._lock = threading.Lock()
        self.ranges: list[int] = []

    def get(self, key: str) -> Any:
        return self._store.get(key)

    def get_range(self, key: str, **where: int) -> Any:
        with self._lock:
            self.ranges.append(where["start"])
        if self._fails_at is not None and where["start"] >= self._fails_at:
            raise GenericError("the fault")
        return self._store.get_range(key, **where)


class KnowsNoRanges(Watched):
    """A store like `rclone serve s3`, which answers a range request with status 200."""

    def get_range(self, key: str, **where: int) -> Any:
        self.ranges.append(where["start"])
        raise GenericError("Generic S3 error: Received non-partial response when range requested")


def pieces_of(store: Watched) -> RangedReader:
    return RangedReader(store)  # type: ignore[arg-type]


def data(size: int = SIZE) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("kind", [Watched, KnowsNoRanges])
def test_pieces_are_the_object_in_order(kind: type[Watched]) -> None:
    """The joined pieces are the object, with and without range requests."""
    pieces = pieces_of(kind(data()))
    assert b"".join(pieces.read("key")) == data()


def test_a_server_without_ranges_is_asked_once() -> None:
    """Support for ranges is tested once per store."""
    store = KnowsNoRanges(data())
    pieces = pieces_of(store)
    for _ in range(3):
        assert sum(map(len, pieces.read("key"))) == SIZE
    assert store.ranges == [0]


def test_small_objects_take_no_range() -> None:
    """An object of at most one window takes one request."""
    store = Watched(data(WINDOW_BYTES))
    assert [len(piece) for piece in pieces_of(store).read("key")] == [WINDOW_BYTES]
    assert store.ranges == []


def test_more_readers_than_room_all_finish() -> None:
    """Readers share a bounded number of windows without a deadlock."""
    pieces = pieces_of(Watched(data()))
    sizes = in_parallel(
        lambda _: sum(map(len, pieces.read("key"))), range(WINDOWS_AT_ONCE + 4), threads=WINDOWS_AT_ONCE + 4
    )
    assert sizes == [SIZE] * (WINDOWS_AT_ONCE + 4)


def test_a_reader_that_is_not_read_on_stops_at_the_room_there_is() -> None:
    """A paused reader fetches no more windows than its limit, however large the object."""
    store = Watched(bytes((WINDOWS_AT_ONCE + 4) * WINDOW_BYTES))
    reader = pieces_of(store).read("key")
    next(reader)
    reader.close()
    assert len([start for start in store.ranges if start]) < WINDOWS_AT_ONCE + 1


@pytest.mark.parametrize("times", [WINDOWS_AT_ONCE + 1])
def test_a_failed_read_gives_its_room_back(times: int) -> None:
    """A failed read frees its windows for the next reader."""
    store = Watched(data(), fails_at=WINDOW_BYTES)
    pieces = pieces_of(store)
    for _ in range(times):
        with pytest.raises(GenericError, match="the fault"):
            list(pieces.read("key"))
    store._fails_at = None
    assert b"".join(pieces.read("key")) == data()


def test_a_missing_object_is_not_found(tmp_path: Path) -> None:
    """The store's error for a missing key is passed on."""
    with pytest.raises(FileNotFoundError):
        list(RangedReader(MemoryStore()).read(tmp_path.name))
